"""One tile of attention, which every loop of the kernels is made of: product, bias, softmax, product."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # logits are in powers of two: GPUs have an instruction for these


@triton.jit
def logits(q, k, PRECISION: tl.constexpr):
    """Products of queries and keys ``[rows of q, rows of k]``, not scaled."""
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def attend_to_tile(
    acc, l_i, m_i, q, k, v, bias, qk_scale, BIASED: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Attend to one tile of keys and values; logits and their bias ``[rows of k]`` are in powers of two."""
    qk = logits(q, k, PRECISION)
    if ONLINE:
        qk *= qk_scale
        if BIASED:
            qk += bias[None, :]
        m_new = tl.maximum(m_i, tl.max(qk, axis=1))
        alpha = tl.exp2(m_i - m_new)
        m_i = m_new
        l_i *= alpha
        acc *= alpha[:, None]
        p = tl.exp2(qk - m_i[:, None])
    elif BIASED:
        p = tl.exp2(qk * qk_scale + (bias[None, :] - m_i[:, None]))
    else:
        p = tl.exp2(qk * qk_scale - m_i[:, None])
    l_i += tl.sum(p, axis=1)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION), l_i, m_i
