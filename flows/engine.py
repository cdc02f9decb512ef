"""Which engine runs a flow: a Prefect server that is already up, or none, and then the stages are plain calls.

A flow is written once, as a function that takes an engine and calls its stages through it::

    def krr(experiment, *, run: Engine) -> dict:
        features = run.stage("features", materialise, experiment)
        ...

    run_flow("krr", krr, experiment, engine=open_engine())

No run starts a server: a cold one takes tens of seconds. Without one, Prefect is not even imported.
"""

from __future__ import annotations

import logging
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.signals import sigterm_unwinds
from pipelines.errors import may_pass

from .server import find_recorded_server, is_healthy

log = logging.getLogger("megagram")

RETRIES = 1
RETRY_DELAY = 2.0
"""Seconds between a stage's failure and the next try."""

PROGRESS_INTERVAL = 3.0
"""Seconds between two progress artifacts of one stage: each costs the server some 25 ms."""


class Engine(Protocol):
    """What a flow sees of the engine that runs it. name: a sentence that says which it is."""

    name: str

    def stage(
        self, name: str, function: Callable[..., Any], *args: Any, retries: int = RETRIES, **kwargs: Any
    ) -> Any:
        """Return ``function(*args, **kwargs)``, a small value: arrays travel by store.

        Errors that may pass are met with another try, at most ``retries`` times; every other, and the last,
        is raised unchanged.
        """

    def progress(self, stage: str, done: float, total: float, message: str = "") -> None:
        """Show that ``done`` of ``total`` is done; may be called as often as one likes, and never fails."""

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], description: str = "") -> None:
        """Show a table; never fails."""

    def markdown(self, key: str, text: str, description: str = "") -> None:
        """Show a page of Markdown; never fails."""

    def flow(self, name: str, run_name: str, body: Callable[[], Any]) -> Any:
        """Return ``body()``, run as a flow of this name."""


def run_flow(
    name: str,
    function: Callable[..., Any],
    *args: Any,
    engine: Engine,
    run_name: str | None = None,
    **kwargs: Any,
) -> Any:
    """Return ``function(*args, run=engine, **kwargs)``, run as the flow ``name``.

    run_name: what Prefect calls this run, such as the experiment's name and the run id. An error of
    the function is raised unchanged; SIGTERM ends the program as Ctrl-C does, with everything put in order.
    """
    with sigterm_unwinds():
        return engine.flow(name, run_name or name, lambda: function(*args, run=engine, **kwargs))


def open_engine() -> Engine:
    """Find the engine, in this order: PREFECT_API_URL, the active Prefect profile, ``megagram server``.

    The first of them that answers within a second is used. With none configured this takes milliseconds.
    """
    silent = []
    for url, source in _candidates():
        if is_healthy(url):
            return PrefectEngine(url, source)
        silent.append(f"{url} ({source}) does not answer")
    if server := find_recorded_server():
        return PrefectEngine(server.url, "started by megagram server")
    return DirectEngine("; ".join(silent))


class DirectEngine:
    """Stages are plain calls. reason: why, when a server was to be used."""

    def __init__(self, reason: str = "") -> None:
        self.name = "no Prefect server: stages ran directly" + (f" ({reason})" if reason else "")

    def stage(
        self, name: str, function: Callable[..., Any], *args: Any, retries: int = RETRIES, **kwargs: Any
    ) -> Any:
        for left in range(retries, -1, -1):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not left or not may_pass(error):
                    raise
                log.warning("stage %s failed and is tried again: %s", name, _line(error))
                time.sleep(RETRY_DELAY)
        raise AssertionError("unreachable")

    def progress(self, stage: str, done: float, total: float, message: str = "") -> None:
        pass

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], description: str = "") -> None:
        pass

    def markdown(self, key: str, text: str, description: str = "") -> None:
        pass

    def flow(self, name: str, run_name: str, body: Callable[[], Any]) -> Any:
        return body()


class PrefectEngine:
    """A flow run on a Prefect server, with one task run per stage.

    What Prefect is given to run takes and returns nothing: arguments, results and errors pass it by, so
    that it stores none of them. Should the server be lost, the work goes on without it.
    """

    def __init__(self, url: str, source: str) -> None:
        self.url = url
        self.name = f"Prefect server at {url.removesuffix('/api')} ({source})"
        self._shown: dict[str, tuple[Any, float]] = {}
        self._lost = False
        _prepare_environment(url)

    def stage(
        self, name: str, function: Callable[..., Any], *args: Any, retries: int = RETRIES, **kwargs: Any
    ) -> Any:
        from prefect import task
        from prefect.cache_policies import NO_CACHE

        call = _Call(lambda: function(*args, **kwargs))
        run = task(
            name=name,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=retries,
            retry_delay_seconds=RETRY_DELAY,
            retry_condition_fn=_may_retry,
        )(call.run)
        self._pass_through(run, call)
        return call.value

    def flow(self, name: str, run_name: str, body: Callable[[], Any]) -> Any:
        from prefect import flow
        from prefect.settings import PREFECT_API_URL, temporary_settings
        from prefect.states import Failed

        call = _Call(body)

        def run() -> Any:
            try:
                call.run()
            except Exception as error:
                # Raised, it would be stored as a pickle; the state's message says the same.
                return Failed(message=_line(error))
            return None

        # The names may hold braces, which Prefect would take for a template.
        prefect_flow = flow(
            name=name, flow_run_name=lambda: run_name, persist_result=False, validate_parameters=False
        )(run)
        with temporary_settings({PREFECT_API_URL: self.url}):
            self._pass_through(lambda: prefect_flow(return_state=True), call)
        if call.error is not None:
            raise call.error
        return call.value

    def progress(self, stage: str, done: float, total: float, message: str = "") -> None:
        artifact, last = self._shown.get(stage, (None, 0.0))
        now = time.monotonic()
        if self._lost or (artifact is not None and done < total and now - last < PROGRESS_INTERVAL):
            return
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = 100.0 * done / total if total else 100.0
        text = message or f"{done:g} of {total:g}"
        if artifact is None:
            artifact = self._show(create_progress_artifact, percent, key=_slug(stage), description=text)
        else:
            self._show(update_progress_artifact, artifact, progress=percent, description=text)
        self._shown[stage] = (artifact, now)

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], description: str = "") -> None:
        from prefect.artifacts import create_table_artifact

        self._show(
            create_table_artifact, [dict(row) for row in rows], key=_slug(key), description=description
        )

    def markdown(self, key: str, text: str, description: str = "") -> None:
        from prefect.artifacts import create_markdown_artifact

        self._show(create_markdown_artifact, text, key=_slug(key), description=description)

    def _show(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._lost:
            return None
        try:
            return create(*args, **kwargs)
        except Exception as error:
            self._lose(error)
            return None

    def _pass_through(self, run: Callable[[], Any], call: _Call) -> None:
        """Run ``call`` by way of Prefect; when Prefect itself fails, finish it without."""
        from prefect.exceptions import Abort

        try:
            run()
        except (Exception, Abort) as error:
            if error is call.error:
                raise
            self._lose(error)
            if not call.began:
                call.run()
            elif call.error is not None:
                raise call.error from None

    def _lose(self, error: BaseException) -> None:
        if not self._lost:
            self._lost = True
            self.name += "; it was lost on the way, and the work went on without it"
            log.warning("the Prefect server at %s is lost (%s); the work goes on", self.url, _line(error))


class _Call:
    """A call whose outcome is kept here, whatever Prefect makes of it."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self._body = body
        self.began = False
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        self.began, self.error = True, None
        try:
            self.value = self._body()
        except BaseException as error:
            self.error = error
            raise


def _may_retry(task: Any, task_run: Any, state: Any) -> bool:
    error = state.data
    return isinstance(error, BaseException) and may_pass(error)


def _candidates() -> Iterator[tuple[str, str]]:
    """Addresses that the user has configured, with where."""
    if url := os.environ.get("PREFECT_API_URL"):
        yield url.rstrip("/"), "PREFECT_API_URL"
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    try:
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
        active = os.environ.get("PREFECT_PROFILE") or profiles["active"]
        url = profiles["profiles"][active]["PREFECT_API_URL"]
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or none that names a server
        return
    yield str(url).rstrip("/"), f"Prefect profile {active!r}"


def _prepare_environment(url: str) -> None:
    """Settings that Prefect reads when it is imported; what the user has set stays."""
    os.environ["PREFECT_API_URL"] = url
    for name, value in {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The server's pages get every line; the terminal belongs to the command line.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
        # Of a server that is lost, Prefect's own five tries would hold a finished run up for minutes.
        "PREFECT_CLIENT_MAX_RETRIES": "1",
    }.items():
        os.environ.setdefault(name, value)


def _slug(text: str) -> str:
    """A key as Prefect takes it: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "artifact"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
