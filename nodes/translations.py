"""What the nodes say while they work, in Chinese: one table, by the English that the code says."""

from __future__ import annotations

import re
from functools import cache

CHINESE = {
    # The status, line by line.
    "PSA off: nothing is changed": "PSA 已关闭：什么都不改",
    "step {}: sparse": "第 {} 步：稀疏",
    "step {}: dense": "第 {} 步：稠密",
    "step {}: no attention call": "第 {} 步：没有注意力调用",
    "density so far {}": "目前密度 {}",
    "attention {}x faster": "注意力速度：稠密的 {} 倍",
    "attention {}x slower": "注意力耗时：稠密的 {} 倍",
    "attention as fast as dense": "注意力与稠密一样快",
    "{} of {} steps sparse": "{1} 步中 {0} 步稀疏",
    "mean density {} ({})": "平均密度 {}（{}）",
    "dense calls: {}": "稠密调用 {} 次：",
    "dense calls: {}, most of them": "稠密调用 {} 次，多数：",
    "not used:": "未使用：",
    "finished after {} s": "完成，用时 {} 秒",
    "interrupted after {} s": "被中断，用时 {} 秒",
    "failed after {} s": "失败，用时 {} 秒",
    # Why a call stays dense.
    "before start_percent {}": "早于 start_percent {}",
    "after end_percent {}": "晚于 end_percent {}",
    "shorter than min_tokens {}": "短于 min_tokens {}",
    "in dense_blocks": "在 dense_blocks 中",
    "in a block that ComfyUI does not name, while dense_blocks is set": (
        "设置了 dense_blocks，而 ComfyUI 没有说明这是哪一块"
    ),
    "because PSA could not run ({})": "PSA 无法运行（{}）",
    "the call has a mask": "调用带有掩码",
    "the call asks for attention in {}": "调用要求以 {} 计算注意力",
    "the call has arguments that PSA does not know ({})": "调用带有 PSA 不认识的参数（{}）",
    "head dim {} is not one of {}": "头的维度 {} 不在 {} 之中",
    "text or image context as long as the video, so that self-attention cannot be told from cross attention": (
        "文本或图像的上下文与视频一样长，无法区分自注意力与交叉注意力"
    ),
    # Why PSA could not run.
    "PSA is made for NVIDIA GPUs; on {} only the backend 'reference' works, slowly": (
        "PSA 为 NVIDIA 显卡而作；在 {} 上只有后端 reference 可用，很慢"
    ),
    "Triton is not installed; install the {} release that fits torch {}": (
        "没有安装 Triton；请安装与 torch {1} 相配的 {0} 版本"
    ),
    "Triton kernels take bf16, fp16 and fp32, not {}": "Triton 内核只接受 bf16、fp16 和 fp32，不接受 {}",
    "the Triton kernels are written for NVIDIA GPUs; AMD ones are not supported yet": (
        "Triton 内核为 NVIDIA 显卡编写，尚不支持 AMD"
    ),
    "the GPU is {}; the Triton kernels need sm_80 (Ampere) or newer": (
        "显卡是 {}；Triton 内核需要 sm_80（Ampere）或更新"
    ),
    "Triton kernels run on CUDA devices, not on {}": "Triton 内核在 CUDA 设备上运行，不在 {} 上",
    "self-check of backend {} on {}": "后端 {} 的自检失败，{}",
    # Why PSA is not used at all.
    "{} is not a model that PSA knows ({})": "{} 不是 PSA 认识的模型（{}）",
    "another node has given {} a forward function that PSA cannot read": (
        "另一个节点给 {} 换了 PSA 读不懂的 forward 函数"
    ),
    "the latent has shape {}, not [batch, channels, frames, height, width]": (
        "latent 的形状是 {}，不是 [batch, channels, frames, height, width]"
    ),
    "the sampler does not tell the model its noise level": "采样器没有告诉模型噪声水平",
    (
        "the model was not called through ComfyUI's diffusion model wrappers; either nothing was sampled, or another "
        "node runs the model in its own way"
    ): "模型没有经过 ComfyUI 的包装函数被调用：要么什么都没采样，要么另一个节点用自己的方式运行模型",
    (
        "no attention call came by; another node has probably replaced the model's attention functions, or this "
        "ComfyUI's version of the model does not pass its options on to its blocks (as Wan S2V in 0.3.75)"
    ): (
        "没有注意力调用经过：可能另一个节点替换了模型的注意力函数，或这个 ComfyUI 版本的模型不把选项传给各块"
        "（如 0.3.75 的 Wan S2V）"
    ),
    (
        "no attention call was the self-attention of the expected {} tokens; another node has probably changed the "
        "sequence"
    ): "没有一次注意力调用是预期的 {} 个 token 的自注意力：可能另一个节点改动了序列",
    # What to know about the choice of preset.
    "no released Wan has width {} and {} blocks; {} is the nearest": (
        "已发布的 Wan 中没有宽 {}、{} 块的；最接近的是 {}"
    ),
    "no released CogVideoX has {} heads and {} blocks; {} is the nearest": (
        "已发布的 CogVideoX 中没有 {} 头、{} 块的；最接近的是 {}"
    ),
    "{} has the same architecture; for its presets use PSA Preset Loader": (
        "{} 的结构与此相同；要用它的预设，请用 PSA 预设加载器"
    ),
    "{} has no presets of its own; those of {} are used": "{} 没有自己的预设，使用 {} 的",
    "its VACE blocks count as blocks {} to {}": "它的 VACE 块算作第 {} 到 {} 块",
    # PSA Report.
    "No run yet": "还没有运行",
    "Sample with this model, then run the report; connect the sampler's latent to it.": (
        "请先用这个模型采样，再运行报告；把采样器的 latent 接到它上面。"
    ),
    "PSA is not on this model": "这个模型上没有 PSA",
    "It has no PSA Attention Patch, or the preset is off.": "它没有经过 PSA 注意力补丁，或预设是 off。",
    "sparse calls: {}, dense: {}": "稀疏调用 {} 次，稠密 {} 次",
    "{} tokens": "{} 个 token",
    "dense: {} {}": "稠密 {} 次：{}",
    "block pairs at level {}: {}": "层级 {} 的块对：{}",
    "in sparse calls: {} s": "稀疏调用用时：{} 秒",
    "in dense calls: {} s": "稠密调用用时：{} 秒",
    "the sparse calls if dense, estimated: {} s": "稀疏调用若稠密，估计：{} 秒",
    "the sparse calls if dense: no estimate, as no dense call like {} of them was timed": (
        "稀疏调用若稠密：无法估计，其中 {} 次没有同样大小的稠密调用计过时"
    ),
}
"""Chinese by English; {} stands for what differs, and is translated by itself."""


def translated(text: str, language: str) -> str:
    """Say a text in a language, line by line; what the table lacks stays in English.

    Args:
        text: English, as the code says it.
        language: A code such as ``en`` or ``zh``; every language but Chinese gets English.
    """
    if language.partition("-")[0].lower() != "zh":
        return text
    return "\n".join(map(_chinese, text.split("\n")))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", "(.+)"))


def _chinese(text: str) -> str:
    if text in CHINESE:
        return CHINESE[text]
    for english, chinese in CHINESE.items():
        if match := _pattern(english).fullmatch(text):
            return chinese.format(*map(_chinese, match.groups()))
    return text
