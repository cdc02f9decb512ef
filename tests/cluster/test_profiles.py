"""Profiles: what a file may say, what it comes to on a machine, and how a mistake in one is answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import profiles
from cluster.errors import ProfileError
from cluster.profiles import (
    KERNEL_PATH_VARIABLE,
    KERNEL_PATHS,
    MEMORY_SHARE,
    Profile,
    gpu_names,
    parse_memory,
    shipped_profiles,
)
from kernels import fused


@pytest.fixture
def no_gpus(monkeypatch):
    monkeypatch.setattr(profiles, "visible_gpus", lambda: ())


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_are_valid(name):
    assert Profile.load(name).name == name


def test_default_is_local_and_serial_has_no_processes():
    assert {"local", "serial"} <= set(shipped_profiles())
    assert Profile.load("local").kind == "local"
    assert Profile.load("serial").kind == "serial"


def test_a_misspelt_key_is_answered_with_the_nearest(tmp_path):
    path = write(tmp_path, "wokers = 2")
    with pytest.raises(ProfileError, match=r"mine\.toml: unknown key 'wokers'; did you mean 'workers'\?"):
        Profile.load(path)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ProfileError, match="did you mean 'local'"):
        Profile.load("loca")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ProfileError, match=r"absent\.toml: cannot be read"):
        Profile.load(tmp_path / "absent.toml")


def test_broken_toml_is_named(tmp_path):
    with pytest.raises(ProfileError, match=r"mine\.toml: is not valid TOML"):
        Profile.load(write(tmp_path, "workers = "))


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('kind = "slrm"', "kind"),
        ("workers = 0", "workers"),
        ("workers = true", "workers"),
        ('workers = "many"', "workers"),
        ('memory = "2 bananas"', "memory"),
        ("memory = -1", "memory"),
        ("blas_threads = 0", "blas_threads"),
        ("blas_coretype = 7", "blas_coretype"),
        ('kernel_path = "numpy"', "kernel_path.*must be one of auto, general, compiled, cuda"),
        ('kernel_path = "compild"', "kernel_path.*did you mean 'compiled'"),
        ("environment = { MEGAGRAM_KERNEL_PATH = 'cuda' }", "environment.*use the key kernel_path"),
        ("environment = 3", "environment"),
        ("environment = { A = [1] }", "environment"),
        ('dashboard = "yes"', "dashboard"),
        ("dashboard = 70000", "dashboard"),
        ("worker_timeout = 0", "worker_timeout"),
        ("worker_timeout = inf", "worker_timeout"),
        ('kind = "address"', "address"),
        ('address = "tcp://there:8786"', "address"),
    ],
)
def test_a_bad_value_names_file_and_key(tmp_path, line, key):
    with pytest.raises(ProfileError, match=rf"mine\.toml: .*{key}"):
        Profile.load(write(tmp_path, line))


def test_every_key_is_read(tmp_path):
    text = """
        kind = "local"
        workers = 3
        memory = "1.5GiB"
        blas_threads = 2
        blas_coretype = "Haswell"
        kernel_path = "general"
        environment = { MINE = 4 }
        scratch = "/somewhere"
        dashboard = true
        worker_timeout = 7
    """
    profile = Profile.load(write(tmp_path, text))
    assert profile == Profile(
        "mine", "local", "", 3, 3 * 2**29, 2, "Haswell", "general", {"MINE": "4"}, "/somewhere", 8787, 7.0
    )


ASSUMED = """
[assume]
workers = 3
memory = "4GiB"
gpu_memory = "2GiB"
float64 = 1e12
float32 = 2e12
transcendentals = 1e11
driver_memory = "8GiB"
driver = 1e11
disk = "1TB"
disk_read = 1e9
"""


def test_assumed_machines_are_taken_for_what_is_here(tmp_path):
    """Protects plans for other machines: their number and the smaller of their memories, not this machine's."""
    assert Profile.load(write(tmp_path, ASSUMED)).resources() == profiles.Resources(3, 2 * 2**30)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ASSUMED.replace("driver = 1e11\n", ""), "driver is missing"),
        (ASSUMED + "speed = 1\n", "unknown key 'speed'"),
        (ASSUMED.replace("1e9", "0"), "disk_read: a positive number"),
        (ASSUMED.replace("= 3", "= 0"), "workers: a whole number"),
        ("assume = 3", "a table is needed"),
    ],
)
def test_incomplete_assumptions_are_refused(tmp_path, text, said):
    with pytest.raises(ProfileError, match=said):
        Profile.load(write(tmp_path, text))


def test_description_is_json_and_complete():
    profile = Profile(workers=2, environment={"A": "1"})
    described = json.loads(json.dumps(profile.describe()))
    assert Profile(**described) == profile


@given(st.integers(1, 10**6), st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB", "GiB", "TiB"]))
@settings(deadline=None, max_examples=50)
def test_memory_sizes_are_number_times_unit(number, unit):
    base, powers = (1024 if "i" in unit else 1000), " KMGT"
    power = powers.index(unit[0].upper()) if unit != "B" else 0
    assert parse_memory(f"{number}{unit}") == number * base**power
    assert parse_memory(f" {number} {unit.lower()} ") == number * base**power


@pytest.mark.usefixtures("no_gpus")
def test_automatic_memory_is_an_equal_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(profiles, "available_memory", lambda: 10 * 2**30)
    assert Profile(workers=4).resources().memory == int(MEMORY_SHARE * 10 * 2**30 / 4)
    assert Profile(workers=4, memory=2**30).resources().memory == 2**30


@pytest.mark.usefixtures("no_gpus")
def test_automatic_workers_are_one_per_core(monkeypatch):
    monkeypatch.setattr(profiles, "core_count", lambda: 5)
    assert Profile().resources().workers == 5
    assert Profile(kind="serial").resources().workers == 1


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    """Pages that merely cache files count as free, as the kernel drops them first."""
    limit, used, stat = tmp_path / "max", tmp_path / "current", tmp_path / "stat"
    limit.write_text("1000000\n")
    used.write_text("700000\n")
    stat.write_text("anon 5\ninactive_file 100000\n")
    monkeypatch.setattr(profiles, "_CGROUPS", ((limit, used, stat, "inactive_file"),))
    assert profiles.available_memory() == 400_000
    limit.write_text("max\n")
    assert profiles.available_memory() > 1_000_000


def test_gpus_are_those_that_the_user_left_visible():
    assert gpu_names(2, None) == ("0", "1")
    assert gpu_names(2, "3, GPU-ab") == ("3", "GPU-ab")
    assert gpu_names(0, "") == ()


def test_one_worker_per_gpu(monkeypatch):
    monkeypatch.setattr(profiles, "visible_gpus", lambda: ("0", "1", "2"))
    assert Profile().resources().workers == 3
    assert Profile().resources().gpus == ("0", "1", "2")
    assert Profile(workers=2).resources().gpus == ("0", "1")
    assert Profile(workers=8).resources().gpus == ("0", "1", "2")


# Kernel paths.


def test_paths_and_variable_are_those_that_kernels_know():
    """cluster/ imports no kernels, so it names them itself."""
    assert KERNEL_PATHS == fused.CHOICES
    assert KERNEL_PATH_VARIABLE == fused.VARIABLE


def test_the_users_variable_wins_over_the_profile(tmp_path, monkeypatch):
    path = write(tmp_path, 'kernel_path = "compiled"')
    assert Profile.load(path).kernel_path == "compiled"
    monkeypatch.setenv(KERNEL_PATH_VARIABLE, "general")
    assert Profile.load(path).kernel_path == "general"
    assert Profile.load("local").kernel_path == "general"
    monkeypatch.setenv(KERNEL_PATH_VARIABLE, "fast")
    with pytest.raises(ProfileError, match=r"the variable MEGAGRAM_KERNEL_PATH = 'fast': must be one of"):
        Profile.load("local")


def test_the_hosts_path_leaves_gpus_alone(monkeypatch):
    monkeypatch.setattr(profiles, "visible_gpus", lambda: ("0", "1"))
    assert Profile(kernel_path="cuda").resources().gpus == ("0", "1")
    compiled = Profile(kernel_path="compiled").resources()
    assert compiled.gpus == ()
    assert compiled.workers == profiles.core_count()
