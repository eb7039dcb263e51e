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
    # PSA Quality Probe; a line of its report that is a value to paste or a row of a table stays as it is.
    "PSA Quality Probe: {}": "PSA 质量探测：{}",
    "dense_blocks: leave as it is, no block stands out": "dense_blocks：保持原样，没有哪一块特别突出",
    "No error_weight is suggested: this preset selects by {}, not by error.": (
        "不建议 error_weight：这个预设按 {} 选择，而不是按误差。"
    ),
    "With that, expect an error of {} at density {} in the blocks that stay sparse; wanted was {}.": (
        "这样，保持稀疏的块预计误差 {}，密度 {}；想要的是 {}。"
    ),
    "With that, expect an error of {} at density {}; wanted was {}.": "这样，预计误差 {}，密度 {}；想要的是 {}。",
    (
        "The wanted error is below all that were measured, so this is the smallest weight tried. Set it in the patch "
        "and probe again."
    ): "想要的误差低于所有测到的误差，所以这是试过的最小权重。请把它设到补丁里，再探测一次。",
    (
        "The wanted error is above all that were measured, so this is the largest weight tried. Set it in the patch "
        "and probe again."
    ): "想要的误差高于所有测到的误差，所以这是试过的最大权重。请把它设到补丁里，再探测一次。",
    "This run with error_weight {} had an error of {} at density {}.": (
        "这次运行的 error_weight 是 {}，误差 {}，密度 {}。"
    ),
    "This run had an error of {} at density {}.": "这次运行的误差是 {}，密度 {}。",
    "This run was exact, with error_weight 0.": "这次运行是精确的，error_weight 为 0。",
    "Errors at error_weight {}; the largest: {}": "error_weight 为 {} 时的误差；最大的：{}",
    "Errors; the largest: {}": "误差；最大的：{}",
    (
        "{} of {} sparse calls were compared. Probing took {} s of {} s of sampling: the run was {} times as long as "
        "without."
    ): "{1} 次稀疏调用中比较了 {0} 次。采样用时 {3} 秒，其中探测 {2} 秒：这次运行的用时是不探测时的 {4} 倍。",
    "No call of blocks {} is among them; a larger share would reach them.": (
        "其中没有第 {} 块的调用；更大的比例会包括它们。"
    ),
    "{} comparisons were given up {}.": "{} 次比较被放弃：{}。",
    "for want of memory": "内存不足",
    "{} comparisons gave no finite error and are left out; in {} of them dense attention itself was not finite.": (
        "{} 次比较没有得到有限的误差，未计入；其中 {} 次稠密注意力本身就不是有限的。"
    ),
    "Nothing was sampled, so nothing was measured. The preset is unchanged.": (
        "什么都没采样，所以什么都没测到。预设不变。"
    ),
    "No attention call was sparse, so nothing was measured and the preset is unchanged. The run: {}": (
        "没有一次注意力调用是稀疏的，所以什么都没测到，预设不变。这次运行：{}"
    ),
    "No comparison gave a number. The preset is unchanged.": "没有一次比较得出数值。预设不变。",
    "None of the {} sparse calls was in the share; raise it. The preset is unchanged.": (
        "{} 次稀疏调用中没有一次在探测比例之内；请加大比例。预设不变。"
    ),
    # PSA Compare.
    "{} frames:": "{} 帧：",
    "worst, frame {}:": "最差的第 {} 帧：",
    "PSNR infinite, the same picture, SSIM {}": "PSNR 无穷大，画面相同，SSIM {}",
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
