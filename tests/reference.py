"""Slow, obviously right oracles in float64: plain loops over samples, positions and taps.

Nothing here is shared with the package under test.
"""

from __future__ import annotations

import math

import numpy as np


def kappa_0(u: float) -> float:
    return 1 - math.acos(min(1.0, max(-1.0, u))) / math.pi


def kappa_1(u: float) -> float:
    u = min(1.0, max(-1.0, u))
    return (u * (math.pi - math.acos(u)) + math.sqrt(max(0.0, 1 - u * u))) / math.pi


def scalar(kernel: str, u: float, parameter: float = 1.0) -> float:
    """kappa(u) of a dot-product kernel by name (K3, K5, K6, K9)."""
    match kernel:
        case "exponential":
            return math.exp((u - 1) / parameter**2)
        case "polynomial":
            return u**parameter
        case "linear":
            return parameter * u
        case "relu" | "arc-cosine-1":
            return kappa_1(u)
        case "arc-cosine-0":
            return kappa_0(u)
        case "laplace":
            return math.exp(-parameter * math.sqrt(max(0.0, 1 - u)))
    raise ValueError(kernel)


def fully_connected(family: str, depth: int, u: float) -> float:
    """RF_L(u) or NTK_L(u) (K8)."""
    sigma = theta = min(1.0, max(-1.0, u))
    for _ in range(depth - 1):
        theta = theta * kappa_0(sigma) + kappa_1(sigma)
        sigma = kappa_1(sigma)
    return sigma if family == "rf" else theta


def cosine(x: np.ndarray, y: np.ndarray, floor: float = 1e-6) -> float:
    """<x, y> over the floored norms (K2)."""
    return float(x @ y) / max(np.linalg.norm(x), floor) / max(np.linalg.norm(y), floor)


def homogeneous(function, X: np.ndarray, Y: np.ndarray, floor: float = 1e-6) -> np.ndarray:
    """Matrix of |x| |y| function(cos(x, y)) by loops (K1, K2)."""
    K = np.empty((len(X), len(Y)))
    for i, x in enumerate(X):
        for j, y in enumerate(Y):
            K[i, j] = np.linalg.norm(x) * np.linalg.norm(y) * function(cosine(x, y, floor))
    return K


def pooling_matrix(n: int, kind: str, t: int, p: int, mode: str) -> np.ndarray:
    """Pooling of one axis, tap by tap (C4, C10)."""
    if kind == "global":
        return np.full((1, n), 1 / n)
    size = math.ceil(n / t)
    if mode == "reference":
        size = n // t if kind == "average" else n // t - 1
    H = np.zeros((size, n))
    for i in range(size):
        if kind == "strided":
            window = {t * (i + 1) if mode == "reference" else t * i: 1.0}
        elif kind == "average":
            window = {t * i + k: 1 / p for k in range(p)}
        else:
            total = sum(math.exp(-(k**2) / p**2) for k in range(-p, p + 1))
            centre = t * i + p if mode == "reference" else t * i
            window = {centre + k: math.exp(-(k**2) / p**2) / total for k in range(-p, p + 1)}
        for position, weight in window.items():
            if mode == "periodic":
                H[i, position % n] += weight
            elif 0 <= position < n:
                H[i, position] += weight
    return H


def patch_gram(B: np.ndarray, size: int, periodic: bool = False) -> np.ndarray:
    """B^P of B (h, w, h, w), offset by offset and position by position (C2)."""
    h, w = B.shape[:2]
    q = (size - 1) // 2
    offsets = range(-(size - 1 - q), q + 1)
    out = np.zeros_like(B)
    for i, j, k, m in np.ndindex(*B.shape):
        for d in offsets:
            for e in offsets:
                row, column, row_2, column_2 = i + d, j + e, k + d, m + e
                if periodic:
                    out[i, j, k, m] += B[row % h, column % w, row_2 % h, column_2 % w]
                elif 0 <= row < h and 0 <= row_2 < h and 0 <= column < w and 0 <= column_2 < w:
                    out[i, j, k, m] += B[row, column, row_2, column_2]
    return out


def pool_gram(B: np.ndarray, H: np.ndarray, C: np.ndarray) -> np.ndarray:
    """H on both row axes and C on both column axes of B (h, w, h, w) (C4)."""
    return np.einsum("ai,bj,ck,dm,ijkm->abcd", H, C, H, C, B, optimize=True)


def convolutional(x, y, layers, tangent=False, mode="reference", same=False) -> float:
    """The convolutional kernel of two images (h, w, c), executing every step of C1 to C5 and C8.

    layers: dicts with patch, kernel, parameter, pooling, subsampling, poolfactor, floor, patch_norm.
    same: x and y are one sample, so that equal positions have cosine exactly 1 (K13).
    """

    def start(u, v):
        return np.einsum("ijc,kmc->ijkm", u, v)

    grams = {"xy": start(x, y), "xx": start(x, x), "yy": start(y, y)}
    T = None
    for layer in layers:
        size, periodic = layer["patch"], mode == "periodic"
        scale = size**-2 if layer.get("patch_norm") else 1.0
        grams = {name: scale * patch_gram(B, size, periodic) for name, B in grams.items()}
        T = grams["xy"].copy() if T is None else scale * patch_gram(T, size, periodic)
        norms = {s: np.sqrt(np.einsum("ijij->ij", grams[s + s])) for s in "xy"}
        h, w = norms["x"].shape
        floor = layer.get("floor", 1e-6)
        mapped = {}
        for name, B in grams.items():
            M = np.empty_like(B)
            for i, j, k, m in np.ndindex(*B.shape):
                a, b = norms[name[0]][i, j], norms[name[1]][k, m]
                if layer["kernel"] == "square":
                    M[i, j, k, m] = B[i, j, k, m] ** 2
                    continue
                c = B[i, j, k, m] / max(a, floor) / max(b, floor)
                if (name != "xy" or same) and (i, j) == (k, m) and a > floor:
                    c = 1.0
                M[i, j, k, m] = a * b * scalar(layer["kernel"], c, layer.get("parameter", 1.0))
                if name == "xy" and tangent:
                    T[i, j, k, m] = T[i, j, k, m] * kappa_0(c) + M[i, j, k, m]
            mapped[name] = M
        t = layer.get("subsampling", 1)
        p = layer.get("poolfactor") or t
        H, C = (pooling_matrix(n, layer.get("pooling", "gaussian"), t, p, mode) for n in (h, w))
        grams = {name: pool_gram(M, H, C) for name, M in mapped.items()}
        T = pool_gram(T, H, C)
    return float(np.einsum("ijij->", T if tangent else grams["xy"]))


# Roto-translations (C13, C14)


def interpolated(h: int, row: float, column: float, periodic: bool) -> np.ndarray:
    """Weights (h, h) of the pixels that bilinear interpolation at a point takes; nothing lies beyond the border."""
    weights = np.zeros((h, h))
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            weight = (1 - abs(row - i)) * (1 - abs(column - j))
            if periodic:
                weights[i % h, j % h] += weight
            elif 0 <= i < h and 0 <= j < h:
                weights[i, j] += weight
    return weights


def turned_patches(h: int, size: int, r: int, rotations: int, periodic: bool) -> list[np.ndarray]:
    """P_r: for each offset v of a patch the matrix (h * h, h * h) that takes x to u -> x(u + R_r v) (C14)."""
    angle = 2 * math.pi * r / rotations
    # Rounding must not move a whole offset to a place between two pixels.
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    reach, matrices = (size - 1) // 2, []
    for a in range(-reach, reach + 1):
        for b in range(-reach, reach + 1):
            row, column = cosine * a - sine * b, sine * a + cosine * b
            points = [interpolated(h, i + row, j + column, periodic).ravel() for i, j in np.ndindex(h, h)]
            matrices.append(np.array(points))
    return matrices


def roto_translation(x, y, layers, final, rotations, tangent=False, mode="same", same=False) -> float:
    """K of two images (h, h, c), carrying B[(u, r), (v, s)] for all positions and turns (C14).

    layers: as for ``convolutional``. final: ``rot`` or ``rot+gap``, which ignores the last layer's pooling.
    """
    h, R, periodic = len(x), rotations, mode == "periodic"
    images = {"x": x.reshape(h * h, -1), "y": y.reshape(h * h, -1)}

    def start(one, other):
        B = images[one] @ images[other].T
        return np.tile(B[None, :, None, :], (R, 1, R, 1))  # axes r, u, s, v

    def patch_step(B, P):
        out = np.zeros_like(B)
        for r, s in np.ndindex(R, R):
            out[r, :, s] = sum(P[r][d] @ B[r, :, s] @ P[s][d].T for d in range(len(P[r])))
        return out

    grams = {"xy": start("x", "y"), "xx": start("x", "x"), "yy": start("y", "y")}
    T = None
    for number, layer in enumerate(layers):
        P = [turned_patches(h, layer["patch"], r, R, periodic) for r in range(R)]
        scale = layer["patch"] ** -2 if layer.get("patch_norm") else 1.0
        grams = {name: scale * patch_step(B, P) for name, B in grams.items()}
        T = grams["xy"].copy() if T is None else scale * patch_step(T, P)
        norms = {s: np.sqrt(np.einsum("ruru->ru", grams[s + s])) for s in "xy"}
        mapped = {}
        for name, B in grams.items():
            M = np.empty_like(B)
            for r, u, s, v in np.ndindex(*B.shape):
                a, b = norms[name[0]][r, u], norms[name[1]][s, v]
                c = B[r, u, s, v] / max(a, 1e-6) / max(b, 1e-6)
                if (name != "xy" or same) and (r, u) == (s, v) and a > 1e-6:
                    c = 1.0
                M[r, u, s, v] = a * b * scalar(layer["kernel"], c, layer.get("parameter", 1.0))
                if name == "xy" and tangent:
                    T[r, u, s, v] = T[r, u, s, v] * kappa_0(c) + M[r, u, s, v]
            mapped[name] = M
        if final == "rot+gap" and number == len(layers) - 1:
            return float((T if tangent else mapped["xy"]).mean())
        H = pooling_matrix(h, layer["pooling"], 1, layer["poolfactor"], mode)
        A = np.kron(H, H)
        grams = {name: np.einsum("au,bv,rusv->rasb", A, A, M, optimize=True) for name, M in mapped.items()}
        T = np.einsum("au,bv,rusv->rasb", A, A, T, optimize=True)
    return float(np.einsum("rusu->", T if tangent else grams["xy"]) / R**2)


def nystrom(K: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """K_nM K_MM^+ K_Mn, the Nystrom approximation of K (n, n) on landmarks (F3, R7)."""
    rounding = len(landmarks) * np.finfo(np.float64).eps
    inverse = np.linalg.pinv(K[np.ix_(landmarks, landmarks)], rcond=rounding, hermitian=True)
    return K[:, landmarks] @ inverse @ K[landmarks]


def first_two_pivots(K: np.ndarray) -> dict[tuple[int, int], float]:
    """Probability of each ordered pair of first pivots of randomly pivoted Cholesky: each in proportion to the
    diagonal that the ones before it leave."""
    out = {}
    n = len(K)
    for i in range(n):
        left = [K[j, j] - K[i, j] ** 2 / K[i, i] if j != i else 0.0 for j in range(n)]
        for j in range(n):
            if j != i:
                out[i, j] = K[i, i] / np.trace(K) * left[j] / sum(left)
    return out


def patches_of(x: np.ndarray, size: int, periodic: bool = False) -> np.ndarray:
    """Patches of maps x (h, w, c), (h, w, size * size * c), entry by entry (C2)."""
    h, w, c = x.shape
    first = (size - 1) // 2 - size + 1
    out = np.zeros((h, w, size, size, c))
    for i, j, k, m in np.ndindex(h, w, size, size):
        row, column = i + first + k, j + first + m
        if periodic:
            out[i, j, k, m] = x[row % h, column % w]
        elif 0 <= row < h and 0 <= column < w:
            out[i, j, k, m] = x[row, column]
    return out.reshape(h, w, -1)


def nystrom_ckn(x: np.ndarray, layers, anchors, epsilon: float, mode: str = "reference") -> np.ndarray:
    """Features of an image (h, w, c) by Nystrom layers (F3), patch by patch: psi(z) = |z| R kappa(Z z/|z|).

    layers: as ``convolutional`` takes them. anchors: of each layer unit rows Z (m, d), or None for patches of a
    linear layer kept as they are. epsilon: in units of kappa(1).
    """
    for layer, Z in zip(layers, anchors, strict=True):
        kernel, parameter, floor = layer["kernel"], layer.get("parameter", 1.0), layer.get("floor", 1e-6)
        scale = 1 / layer["patch"] if layer.get("patch_norm") else 1.0
        z = scale * patches_of(x, layer["patch"], mode == "periodic")
        h, w, _ = z.shape
        square = kernel == "square"
        if Z is None:
            maps = math.sqrt(parameter) * z
        else:
            m = len(Z)
            K = np.empty((m, m))
            for i, j in np.ndindex(m, m):
                K[i, j] = float(Z[i] @ Z[j]) ** 2 if square else scalar(kernel, float(Z[i] @ Z[j]), parameter)
            s, V = np.linalg.eigh(K + epsilon * K[0, 0] * np.eye(m))
            root = V @ np.diag(s**-0.5) @ V.T
            maps = np.empty((h, w, m))
            for i, j in np.ndindex(h, w):
                norm = np.linalg.norm(z[i, j])
                unit = z[i, j] / max(norm, floor)
                values = [
                    float(a @ unit) ** 2 if square else scalar(kernel, float(a @ unit), parameter) for a in Z
                ]
                maps[i, j] = (norm**2 if square else norm) * root @ np.array(values)
        t = layer.get("subsampling", 1)
        p = layer.get("poolfactor") or t
        H, C = (pooling_matrix(n, layer.get("pooling", "gaussian"), t, p, mode) for n in (h, w))
        x = np.zeros((len(H), len(C), maps.shape[2]))
        for i, j, k, n in np.ndindex(len(H), len(C), h, w):
            x[i, j] += H[i, k] * C[j, n] * maps[k, n]
    return x.reshape(-1)


def spherical_k_means_step(patches: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, float, list[int]]:
    """Centroids (k, d) after one update, the objective before it, and the clusters without members (F4)."""
    members: list[list[int]] = [[] for _ in centroids]
    total = 0.0
    for i, z in enumerate(patches):
        near = [float(z @ c) for c in centroids]
        members[near.index(max(near))].append(i)
        total += max(near)
    new = centroids.astype(float)
    for j, chosen in enumerate(members):
        mean = sum((patches[i] for i in chosen), np.zeros(patches.shape[1]))
        if np.linalg.norm(mean) > 0:
            new[j] = mean / np.linalg.norm(mean)
    return new, total / len(patches), [j for j, chosen in enumerate(members) if not chosen]
