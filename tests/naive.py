"""The oracle: every kernel and every version in float64 NumPy, a token at a time, straight from the formulas.

Models run on a checkpoint's official tensors, so what conversion does to them is tested too. Formulas: the rwkv package
0.8.32 (model.py) for v4 to v6, RWKV-LM's RWKV-v7/rwkv_v7_numpy.py for v7.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def error_ratio(got: Any, want: Any) -> float:
    """Root mean square of the error over that of the reference. NaN anywhere gives NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def rounded(x: Any, bits: int) -> F64:
    """x [T, K] as rounded activations stand for it: integers of 8 or 15 bits in groups of 32 columns.

    What decides which integer is nearest is computed in float32, as it is by kernels.
    """
    T, K = x.shape
    groups, most = -(-K // 32), np.float32({8: 127, 15: 32512}[bits])
    grouped = np.pad(np.float32(x), ((0, 0), (0, groups * 32 - K))).reshape(T, groups, 32)
    top = np.abs(grouped).max(-1, keepdims=True)
    levels = np.rint(grouped * (most / np.where(top > 0, top, 1)))
    values: F64 = levels.astype(float) * (top.astype(float) / float(most))
    return values.reshape(T, -1)[:, :K]


def eleven_bits(x: Any) -> F64:
    """x as the nearest numbers with 11 bits, which float16 has where none is tiny."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(mantissa * 2048) / 2048, exponent)


def sigmoid(x: F64) -> F64:
    return 1 / (1 + np.exp(-x))


def layer_norm(x: F64, weight: F64, bias: F64, eps: float) -> F64:
    """Over the last axis."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def group_norm(x: F64, weight: F64, bias: F64, heads: int, eps: float) -> F64:
    """x [..., D] in `heads` groups."""
    parts = x.reshape(*x.shape[:-1], heads, -1)
    return layer_norm(parts, np.float64(1), np.float64(0), eps).reshape(x.shape) * weight + bias


def wkv4(k: F64, v: F64, w: F64, u: F64, a: F64, b: F64) -> F64:
    """Without the running maximum, for inputs that do not overflow: y [T, D]; a and b [D] are changed."""
    out = []
    for kt, vt in zip(k, v, strict=True):
        out.append((a + np.exp(u + kt) * vt) / (b + np.exp(u + kt)))
        a[:] = np.exp(w) * a + np.exp(kt) * vt
        b[:] = np.exp(w) * b + np.exp(kt)
    return np.array(out)


def wkv6(r: F64, k: F64, v: F64, w: F64, u: F64, S: F64) -> F64:
    """r, k, v, w [T, H, N], u [H, N], S [H, key, value], changed; y [T, H, N]."""
    out = []
    for rt, kt, vt, wt in zip(r, k, v, w, strict=True):
        kv = np.einsum("hi,hj->hij", kt, vt)
        out.append(np.einsum("hi,hij->hj", rt, u[:, :, None] * kv + S))
        S[:] = wt[:, :, None] * S + kv
    return np.array(out)


def wkv7(r: F64, w: F64, k: F64, v: F64, kappa: F64, beta: F64, S: F64) -> F64:
    """All [T, H, N], S [H, value, key], changed; y [T, H, N]."""
    out = []
    for rt, wt, kt, vt, at, bt in zip(r, w, k, v, kappa, beta, strict=True):
        removed = np.einsum("hij,hj->hi", S, -at)
        S[:] = S * wt[:, None, :] + np.einsum("hi,hj->hij", removed, bt) + np.einsum("hi,hj->hij", vt, kt)
        out.append(np.einsum("hij,hj->hi", S, rt))
    return np.array(out)


def log_softmax(logits: F64) -> F64:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Naive:
    """A model of any version on its official tensors."""

    def __init__(
        self,
        version: str,
        tensors: Mapping[str, Any],
        group_norm_eps: float = 64e-5,
        norm_eps: float = 1e-5,
        output_norm_eps: float | None = None,
        silu: bool = False,
    ) -> None:
        """`silu` is the activation of RWKV-7's channel mixing in place of the squared ReLU."""
        # RWKV-7a and 8 rc00 are RWKV-7 but for their channel mixing
        self.version = "7" if version in ("7a", "8-rc00") else version
        self.deep_embed, self.eps, self.norm_eps, self.silu = version == "7a", group_norm_eps, norm_eps, silu
        self.output_norm_eps = norm_eps if output_norm_eps is None else output_norm_eps
        self.z = {name: np.asarray(a, np.float64) for name, a in tensors.items()}
        self.layers = 1 + max(int(name.split(".")[1]) for name in self.z if name.startswith("blocks."))
        self.D = self.z["emb.weight"].shape[1]
        bonus = {"7": "r_k", "6": "time_faaaa", "5.0": "time_first"}.get(self.version, "time_faaaa")
        self.H = 1 if self.version == "4" else self.z[f"blocks.0.att.{bonus}"].shape[0]

    def norm(self, x: F64, name: str) -> F64:
        return layer_norm(
            x,
            self.z[name + ".weight"],
            self.z[name + ".bias"],
            self.output_norm_eps if name == "ln_out" else self.norm_eps,
        )

    def forward(self, ids: Sequence[int]) -> F64:
        """Logits [T, V] from an empty state, or from the tuned one that is among the tensors."""
        self.first: F64 | None = None
        self.ids = list(ids)
        x = self.embedding = self.norm(self.z["emb.weight"][self.ids], "blocks.0.ln0")
        for i in range(self.layers):
            b = f"blocks.{i}."
            x = x + self.time_mix(self.norm(x, b + "ln1"), b + "att.")
            x = x + self.channel_mix(self.norm(x, b + "ln2"), b + "ffn.")
        return self.norm(x, "ln_out") @ self.z["head.weight"].T

    def mix(self, x: F64, name: str) -> F64:
        """Token shift by a `time_mix` (weighs the current token) or another mix (weighs the last one)."""
        last = np.vstack([np.zeros(self.D), x[:-1]])
        m = self.z[name].reshape(-1)
        return x * m + last * (1 - m) if "time_mix_" in name else x + (last - x) * m

    def linear(self, x: F64, name: str) -> F64:
        return x @ self.z[name + ".weight"].T

    def channel_mix(self, x: F64, f: str) -> F64:
        mix = {"6": "time_maa_", "7": "x_"}.get(self.version, "time_mix_")
        k = self.linear(self.mix(x, f + mix + "k"), f + "key")
        k = k * sigmoid(k) if self.silu else np.maximum(k, 0) ** 2
        out = self.linear(k * self.token_gate(x, f) if self.deep_embed else k, f + "value")
        if self.version == "7":
            return out * self.z[f + "enn.weight"][self.ids] if f + "enn.weight" in self.z else out
        return out * sigmoid(self.linear(self.mix(x, f + mix + "r"), f + "receptance"))

    def token_gate(self, x: F64, f: str) -> F64:
        """RWKV-7a: (x · s1) · M · s2 + s0, where M is a matrix for each token."""
        own = self.z[f + "s_emb.weight"][self.ids] + self.linear(self.embedding, f + "s_emb_x")
        low = x @ self.z[f + "s1"]
        rank = low.shape[1]
        return np.einsum("ti,tij->tj", low, own.reshape(-1, rank, rank)) @ self.z[f + "s2"] + self.z[f + "s0"].ravel()

    def heads(self, x: F64) -> F64:
        return x.reshape(len(x), self.H, -1)

    def start(self, a: str) -> F64:
        """The state before the first token, [H, value, key]: a layer's `time_state` (rwkv package, model.py, transposes
        it for v5 and v6, which run on [key, value])."""
        N = self.D // self.H
        return np.array(self.z.get(a + "time_state", np.zeros((self.H, N, N))))

    def time_mix(self, x: F64, a: str) -> F64:
        if self.version == "4":
            r, k, v = (self.linear(self.mix(x, a + f"time_mix_{c}"), a + n) for c, n in _RKV)
            w = -np.exp(self.z[a + "time_decay"])
            y = wkv4(k, v, w, self.z[a + "time_first"], np.zeros(self.D), np.zeros(self.D))
            return self.linear(y * sigmoid(r), a + "output")
        if self.version == "7":
            return self.time_mix7(x, a)
        if self.version == "6":
            m = self.mixes6(x, a)
            r, k, v, g = (self.linear(m[c], a + n) for c, n in (*_RKV, ("g", "gate")))
            w = (
                self.z[a + "time_decay"].reshape(-1)
                + np.tanh(m["w"] @ self.z[a + "time_decay_w1"]) @ self.z[a + "time_decay_w2"]
            )
        else:
            r, k, v = (self.linear(self.mix(x, a + f"time_mix_{c}"), a + n) for c, n in _RKV)
            g = None if self.version.startswith("5.0") else self.linear(self.mix(x, a + "time_mix_g"), a + "gate")
            decay = self.z[a + "time_decay"].reshape(self.H, -1)
            w = np.broadcast_to(decay, (self.H, self.D // self.H)).reshape(1, -1).repeat(len(x), 0)
        u = np.exp(self.z[a + "time_first"]) if self.version == "5.0" else self.z[a + "time_faaaa"]
        u = np.broadcast_to(u.reshape(self.H, -1), (self.H, self.D // self.H))
        S = self.start(a).transpose(0, 2, 1)
        y = wkv6(*map(self.heads, (r, k, v, np.exp(-np.exp(w)))), u, S).reshape(len(x), -1)
        y = group_norm(y, self.z[a + "ln_x.weight"], self.z[a + "ln_x.bias"], self.H, self.eps)
        return self.linear(y if g is None else y * g * sigmoid(g), a + "output")

    def mixes6(self, x: F64, a: str) -> dict[str, F64]:
        delta = np.vstack([np.zeros(self.D), x[:-1]]) - x
        low = np.tanh(self.mix(x, a + "time_maa_x") @ self.z[a + "time_maa_w1"]).reshape(len(x), 5, -1)
        extra = np.einsum("tcr,crd->ctd", low, self.z[a + "time_maa_w2"])
        return {
            c: x + delta * (self.z[a + f"time_maa_{c}"].reshape(-1) + e) for c, e in zip("wkvrg", extra, strict=True)
        }

    def low_rank(self, x: F64, name: str, inner: Any) -> F64:
        return inner(x @ self.z[name + "1"]) @ self.z[name + "2"]

    def time_mix7(self, x: F64, a: str) -> F64:
        z = self.z
        m = {c: self.mix(x, a + f"x_{c}") for c in "rwkvag"}
        r, k, v = (self.linear(m[c], a + n) for c, n in _RKV)
        flat = {c: z[a + c].reshape(-1) for c in ("w0", "a0", "k_k", "k_a")}
        w = np.exp(-np.exp(-0.5) * sigmoid(flat["w0"] + self.low_rank(m["w"], a + "w", np.tanh)))
        rate = sigmoid(flat["a0"] + self.low_rank(m["a"], a + "a", lambda y: y))
        g = self.low_rank(m["g"], a + "g", sigmoid)
        kk = self.heads(k * flat["k_k"])
        kk = kk / np.maximum(np.sqrt((kk**2).sum(-1, keepdims=True)), 1e-12)
        k = k * (1 + (rate - 1) * flat["k_a"])
        if self.first is None:
            self.first = v
        else:
            gate = sigmoid(z[a + "v0"].reshape(-1) + self.low_rank(m["v"], a + "v", lambda y: y))
            v = v + (self.first - v) * gate
        rh, kh, vh = map(self.heads, (r, k, v))
        y = wkv7(rh, self.heads(w), kh, vh, kk, kk * self.heads(rate), self.start(a)).reshape(len(x), -1)
        y = group_norm(y, z[a + "ln_x.weight"], z[a + "ln_x.bias"], self.H, self.eps)
        y = y + ((rh * kh * z[a + "r_k"]).sum(-1, keepdims=True) * vh).reshape(len(x), -1)
        return self.linear(y * g, a + "output")


_RKV = (("r", "receptance"), ("k", "key"), ("v", "value"))
