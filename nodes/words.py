"""What the nodes say while they work: sentences as data, said once, in English or in Chinese."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

_log = logging.getLogger(__name__)

SENTENCES = {
    # The status, line by line.
    "title": ("PSA {title}", "PSA {title}"),
    "off": ("PSA off: nothing is changed", "PSA 已关闭：什么都不改"),
    "step_sparse": ("step {step}: sparse", "第 {step} 步：稀疏"),
    "step_dense": ("step {step}: dense", "第 {step} 步：稠密"),
    "step_without_call": ("step {step}: no attention call", "第 {step} 步：没有注意力调用"),
    "density_so_far": ("density so far {density:.2f}", "目前密度 {density:.2f}"),
    "faster": ("attention {times:.1f}x faster", "注意力速度：稠密的 {times:.1f} 倍"),
    "slower": ("attention {times:.1f}x slower", "注意力耗时：稠密的 {times:.1f} 倍"),
    "as_fast": ("attention as fast as dense", "注意力与稠密一样快"),
    "steps_sparse": ("{sparse} of {steps} steps sparse", "{steps} 步中 {sparse} 步稀疏"),
    "mean_density": ("mean density {density:.2f} ({backend})", "平均密度 {density:.2f}（{backend}）"),
    "weight_range": ("error_weight {least} to {largest}", "error_weight 从 {least} 到 {largest}"),
    "expected_work": (
        "expects about {work:.0%} of the attention work",
        "预计约为稠密注意力计算量的 {work:.0%}",
    ),
    "dense_calls": ("dense calls: {count}", "稠密调用 {count} 次："),
    "most_dense_calls": ("dense calls: {count}, most of them", "稠密调用 {count} 次，多数："),
    "not_used": ("not used:", "未使用："),
    "finished": ("finished after {seconds:.1f} s", "完成，用时 {seconds:.1f} 秒"),
    "interrupted": ("interrupted after {seconds:.1f} s", "被中断，用时 {seconds:.1f} 秒"),
    "failed": ("failed after {seconds:.1f} s", "失败，用时 {seconds:.1f} 秒"),
    # The line of the log.
    "run": ("{parts:; }", "{parts:；}"),
    "unused": ("not used: {cause}", "未使用：{cause}"),
    "sparse_calls": ("{facts:, }", "{facts:，}"),
    "sparse_count": ("{count} sparse calls", "{count} 次稀疏调用"),
    "sparse_count_and_density": (
        "{count} sparse calls (mean density {density:.3f}, {backend})",
        "{count} 次稀疏调用（平均密度 {density:.3f}，{backend}）",
    ),
    "times_dense_speed": ("{times:.1f}x dense speed", "速度为稠密的 {times:.1f} 倍"),
    "dense_count": ("{count} dense calls", "{count} 次稠密调用"),
    "dense_reasons": ("{count} dense calls ({reasons:, })", "{count} 次稠密调用（{reasons:，}）"),
    "left_to": ("{calls}, left to the attention of {owner}", "{calls}，由 {owner} 的注意力计算"),
    "counted": ("{count} {reason}", "{count} 次{reason}"),
    "tokens": ("{tokens} tokens", "{tokens} 个 token"),
    # Why a call stays dense.
    "before_start": ("before start_percent {percent:g}", "早于 start_percent {percent:g}"),
    "after_end": ("after end_percent {percent:g}", "晚于 end_percent {percent:g}"),
    "short": ("shorter than min_tokens {tokens}", "短于 min_tokens {tokens}"),
    "dense_block": ("in dense_blocks", "在 dense_blocks 中"),
    "unnamed_block": (
        "in a block that ComfyUI does not name, while dense_blocks or block_weights is set",
        "设置了 dense_blocks 或 block_weights，而 ComfyUI 没有说明这是哪一块",
    ),
    "could_not_run": ("because PSA could not run ({failure})", "PSA 无法运行（{failure}）"),
    "mask": ("the call has a mask", "调用带有掩码"),
    "precision": ("the call asks for attention in {dtype}", "调用要求以 {dtype} 计算注意力"),
    "unknown_arguments": (
        "the call has arguments that PSA does not know ({names:, })",
        "调用带有 PSA 不认识的参数（{names:, }）",
    ),
    "gradients": (
        "the call needs gradients, which PSA does not compute",
        "调用需要梯度，而 PSA 不计算梯度",
    ),
    "head_dim": ("head dim {head_dim} is not one of {allowed:, }", "头的维度 {head_dim} 不在 {allowed:, } 之中"),
    "context_as_long": (
        "text or image context as long as the video, so that self-attention cannot be told from cross attention",
        "文本或图像的上下文与视频一样长，无法区分自注意力与交叉注意力",
    ),
    # Why PSA could not run.
    "said": ("{text}", "{text}"),
    "exception": ("{type}: {text}", "{type}: {text}"),
    "self_check": ("{english}", "自检失败：{english}"),
    # Likewise psa_core's own reasons, by their code; it says them in English itself.
    "cannot_run.triton_missing": ("{english}", "没有安装 Triton；请安装与 torch {torch} 相配的 {package} 版本"),
    "cannot_run.dtype": ("{english}", "Triton 内核只接受 bf16、fp16 和 fp32，不接受 {dtype}"),
    "cannot_run.head_dim": ("{english}", "头的维度 {head_dim} 不在 {allowed} 之中"),
    "cannot_run.gradients": ("{english}", "Triton 内核不计算梯度，而输入需要梯度"),
    "cannot_run.amd": ("{english}", "Triton 内核为 NVIDIA 显卡编写，尚不支持 AMD"),
    "cannot_run.capability": ("{english}", "显卡是 sm_{capability}；Triton 内核需要 sm_80（Ampere）或更新"),
    "cannot_run.device": ("{english}", "Triton 内核在 CUDA 设备上运行，不在 {device} 上"),
    "cannot_run.only_reference": (
        "{english}",
        "PSA 为 NVIDIA 显卡而作；在 {device} 上只有后端 reference 可用，很慢",
    ),
    # Why PSA is not used at all.
    "unknown_model": (
        "{model} is not a model that PSA knows ({known:; })",
        "{model} 不是 PSA 认识的模型（{known:；}）",
    ),
    "family_of_classes": ("{classes:, }: {family}", "{classes:, }：{family}"),
    "foreign_forward": (
        "another node has given {model} a forward function that PSA cannot read",
        "另一个节点给 {model} 换了 PSA 读不懂的 forward 函数",
    ),
    "no_video": (
        "the latent has shape {shape}, not [batch, channels, frames, height, width]",
        "latent 的形状是 {shape}，不是 [batch, channels, frames, height, width]",
    ),
    "no_sigma": ("the sampler does not tell the model its noise level", "采样器没有告诉模型噪声水平"),
    "no_model_call": (
        "the model was not called through ComfyUI's diffusion model wrappers; either nothing was sampled, or another "
        "node runs the model in its own way",
        "模型没有经过 ComfyUI 的包装函数被调用：要么什么都没采样，要么另一个节点用自己的方式运行模型",
    ),
    "no_call": (
        "no attention call came by; another node has probably replaced the model's attention functions, or this "
        "ComfyUI's version of the model does not pass its options on to its blocks (as Wan S2V in 0.3.75)",
        "没有注意力调用经过：可能另一个节点替换了模型的注意力函数，或这个 ComfyUI 版本的模型不把选项传给各块"
        "（如 0.3.75 的 Wan S2V）",
    ),
    "no_video_call": (
        "no attention call was the self-attention of the expected {tokens} tokens; another node has probably changed "
        "the sequence",
        "没有一次注意力调用是预期的 {tokens} 个 token 的自注意力：可能另一个节点改动了序列",
    ),
    # What to know about the choice of preset.
    "unreleased_wan": (
        "no released Wan has width {width} and {blocks} blocks; {nearest} is the nearest",
        "已发布的 Wan 中没有宽 {width}、{blocks} 块的；最接近的是 {nearest}",
    ),
    "unreleased_cogvideox": (
        "no released CogVideoX has {heads} heads and {blocks} blocks; {nearest} is the nearest",
        "已发布的 CogVideoX 中没有 {heads} 头、{blocks} 块的；最接近的是 {nearest}",
    ),
    "same_architecture": (
        "{others: and } has the same architecture; for its presets use PSA Preset Loader",
        "{others:、} 的结构与此相同；要用它的预设，请用 PSA 预设加载器",
    ),
    "borrowed_presets": (
        "{model} has no presets of its own; those of {other} are used",
        "{model} 没有自己的预设，使用 {other} 的",
    ),
    "vace_blocks": ("its VACE blocks count as blocks {first} to {last}", "它的 VACE 块算作第 {first} 到 {last} 块"),
    # PSA Report.
    "no_run": ("No run yet", "还没有运行"),
    "sample_first": (
        "Sample with this model, then run the report; connect the sampler's latent to it.",
        "请先用这个模型采样，再运行报告；把采样器的 latent 接到它上面。",
    ),
    "not_patched": ("PSA is not on this model", "这个模型上没有 PSA"),
    "patch_missing": (
        "It has no PSA Attention Patch, or the preset is off.",
        "它没有经过 PSA 注意力补丁，或预设是 off。",
    ),
    "calls": ("sparse calls: {sparse}, dense: {dense}", "稀疏调用 {sparse} 次，稠密 {dense} 次"),
    "dense_because": ("dense: {count} {reason}", "稠密 {count} 次：{reason}"),
    "pairs_at_level": ("block pairs at level {level}: {share:.1%}", "层级 {level} 的块对：{share:.1%}"),
    "weights_by_step": ("error_weight by step: {steps:, }", "各步的 error_weight：{steps:，}"),
    "weight_of_step": ("{step}: {weight}", "{step}：{weight}"),
    "weights_of_step": ("{step}: {least} to {largest}", "{step}：{least} 到 {largest}"),
    "sparse_seconds": ("in sparse calls: {seconds} s", "稀疏调用用时：{seconds} 秒"),
    "dense_seconds": ("in dense calls: {seconds} s", "稠密调用用时：{seconds} 秒"),
    "estimate": ("the sparse calls if dense, estimated: {seconds} s", "稀疏调用若稠密，估计：{seconds} 秒"),
    "no_estimate": (
        "the sparse calls if dense: no estimate, as no dense call like {count} of them was timed",
        "稀疏调用若稠密：无法估计，其中 {count} 次没有同样大小的稠密调用计过时",
    ),
    # PSA Quality Probe; values to paste and the rows of a table are the same in every language.
    "probe_title": ("PSA Quality Probe: {title}", "PSA 质量探测：{title}"),
    "weight_value": ("error_weight: {weight}", "error_weight: {weight}"),
    "blocks_value": ("dense_blocks: {blocks}", "dense_blocks: {blocks}"),
    "base_weight": (
        "It is the preset's base value: its ramp and block_weights multiply it as before.",
        "这是预设的基础值：预设的 ramp 和 block_weights 照旧与它相乘。",
    ),
    "no_block_stands_out": (
        "dense_blocks: leave as it is, no block stands out",
        "dense_blocks：保持原样，没有哪一块特别突出",
    ),
    "no_weight": (
        "No error_weight is suggested: this preset selects by {selection}, not by error.",
        "不建议 error_weight：这个预设按 {selection} 选择，而不是按误差。",
    ),
    "expected": (
        "With that, expect an error of {error:.4f} at density {density:.3f}; wanted was {wanted:g}.",
        "这样，预计误差 {error:.4f}，密度 {density:.3f}；想要的是 {wanted:g}。",
    ),
    "expected_of_the_rest": (
        "With that, expect an error of {error:.4f} at density {density:.3f} in the blocks that stay sparse; wanted "
        "was {wanted:g}.",
        "这样，保持稀疏的块预计误差 {error:.4f}，密度 {density:.3f}；想要的是 {wanted:g}。",
    ),
    "below_reach": (
        "The wanted error is below all that were measured, so this is the smallest weight tried. Set it in the patch "
        "and probe again.",
        "想要的误差低于所有测到的误差，所以这是试过的最小权重。请把它设到补丁里，再探测一次。",
    ),
    "above_reach": (
        "The wanted error is above all that were measured, so this is the largest weight tried. Set it in the patch "
        "and probe again.",
        "想要的误差高于所有测到的误差，所以这是试过的最大权重。请把它设到补丁里，再探测一次。",
    ),
    "this_run_at_weight": (
        "This run with error_weight {weight} had an error of {error:.4f} at density {density:.3f}.",
        "这次运行的 error_weight 是 {weight}，误差 {error:.4f}，密度 {density:.3f}。",
    ),
    "this_run": (
        "This run had an error of {error:.4f} at density {density:.3f}.",
        "这次运行的误差是 {error:.4f}，密度 {density:.3f}。",
    ),
    "this_run_exact": ("This run was exact, with error_weight 0.", "这次运行是精确的，error_weight 为 0。"),
    "errors": ("Errors; the largest: {largest:, }", "误差；最大的：{largest:，}"),
    "errors_at_weight": (
        "Errors at error_weight {weight}; the largest: {largest:, }",
        "error_weight 为 {weight} 时的误差；最大的：{largest:，}",
    ),
    "block_error": ("block {block} {error:.4f}", "第 {block} 块 {error:.4f}"),
    "compared": (
        "{compared} of {calls} sparse calls were compared. Probing took {seconds:.1f} s of {elapsed:.1f} s of "
        "sampling: the run was {slowdown:.2f} times as long as without.",
        "{calls} 次稀疏调用中比较了 {compared} 次。采样用时 {elapsed:.1f} 秒，其中探测 {seconds:.1f} 秒："
        "这次运行的用时是不探测时的 {slowdown:.2f} 倍。",
    ),
    "unseen_blocks": (
        "No call of blocks {blocks} is among them; a larger share would reach them.",
        "其中没有第 {blocks} 块的调用；更大的比例会包括它们。",
    ),
    "given_up": ("{count} comparisons were given up {reason}.", "{count} 次比较被放弃：{reason}。"),
    "no_memory": ("for want of memory", "内存不足"),
    "after_error": ("after {error}", "{error}"),
    "not_finite": (
        "{count} comparisons gave no finite error and are left out; in {dense} of them dense attention itself was not "
        "finite.",
        "{count} 次比较没有得到有限的误差，未计入；其中 {dense} 次稠密注意力本身就不是有限的。",
    ),
    "nothing_sampled": (
        "Nothing was sampled, so nothing was measured. The preset is unchanged.",
        "什么都没采样，所以什么都没测到。预设不变。",
    ),
    "nothing_sparse": (
        "No attention call was sparse, so nothing was measured and the preset is unchanged. The run: {run}",
        "没有一次注意力调用是稀疏的，所以什么都没测到，预设不变。这次运行：{run}",
    ),
    "no_number": (
        "No comparison gave a number. The preset is unchanged.",
        "没有一次比较得出数值。预设不变。",
    ),
    "none_in_share": (
        "None of the {calls} sparse calls was in the share; raise it. The preset is unchanged.",
        "{calls} 次稀疏调用中没有一次在探测比例之内；请加大比例。预设不变。",
    ),
    # PSA Compare.
    "frames": ("{count} frames:", "{count} 帧："),
    "worst_frame": ("worst, frame {frame}:", "最差的第 {frame} 帧："),
    "figures": ("PSNR {psnr:.1f} dB, SSIM {ssim:.3f}", "PSNR {psnr:.1f} dB, SSIM {ssim:.3f}"),
    "same_picture": (
        "PSNR infinite, the same picture, SSIM {ssim:.3f}",
        "PSNR 无穷大，画面相同，SSIM {ssim:.3f}",
    ),
}
"""English and Chinese of every sentence. A value that is several takes what joins them in place of a format."""

Value = object
"""A number, text, a sentence, or a tuple of these."""


@dataclass(frozen=True)
class Words:
    """A sentence as data.

    Args:
        key: Which of ``SENTENCES``.
        values: What differs in it, by name: numbers as numbers, so that only saying them rounds them.
    """

    key: str
    values: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, key: str, **values: object) -> Words:
        """The sentence with these values; of what is no number, text or sentence, its text."""
        return cls(key, tuple((name, _plain(value)) for name, value in values.items()))

    @classmethod
    def of_error(cls, error: BaseException) -> Words:
        """Why psa_core cannot run: by the error's ``code`` and ``values``, where there is a sentence for it."""
        key = f"cannot_run.{getattr(error, 'code', '')}"
        if key not in SENTENCES:
            return cls.of("said", text=_brief(error))
        return cls.of(key, **getattr(error, "values", {}), english=_brief(error))

    @classmethod
    def of_exception(cls, error: BaseException) -> Words:
        """An error of an unforeseen kind, with its type."""
        return cls.of("exception", type=type(error).__name__, text=_brief(error))

    def say(self, language: str = "en") -> str:
        """The sentence in a language.

        Args:
            language: A code such as ``en`` or ``zh-CN``; every language but Chinese gets English.

        Returns:
            Text that can be sent: what UTF-8 has no bytes for is escaped.
        """
        sentence = SENTENCES[self.key][language.partition("-")[0].lower() == "zh"]
        text = sentence.format(**{name: _said(value, language) for name, value in self.values})
        return sendable(text)

    def __str__(self) -> str:
        return self.say()


Report = Callable[[Sequence[Words]], None]
"""Shows sentences to the user, a line each."""


def say_lines(lines: Iterable[Words], language: str = "en") -> str:
    """Sentences in a language, one on each line."""
    return "\n".join(line.say(language) for line in lines)


def plain(number: float, digits: int = 3) -> str:
    """A number in so many digits and without an exponent, as an input takes it."""
    return format(Decimal(f"{number:.{digits}g}"), "f")


def text_of(value: object) -> str:
    """A value as text; its type's name where it will not be text."""
    try:
        return str(value)
    except Exception:
        return type(value).__name__


def sendable(text: str) -> str:
    """Text that UTF-8 has bytes for; what it has none for is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Unfailing:
    """A report that costs nothing but itself where it fails."""

    report: Report

    def __call__(self, lines: Sequence[Words]) -> None:
        try:
            self.report(lines)
        except Exception as error:
            _log.warning("PSA: a status could not be shown: %s", Words.of_exception(error))


class _Several(list[object]):
    def __format__(self, between: str) -> str:
        return between.join(map(str, self))


def _plain(value: object) -> Value:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value if type(value) in (int, float, str, Words) else text_of(value)


def _said(value: Value, language: str) -> object:
    if isinstance(value, tuple):
        return _Several(_said(part, language) for part in value)
    return value.say(language) if isinstance(value, Words) else value


def _brief(error: BaseException) -> str:
    """The first line of an error and its last: a compiler says where first, and what last."""
    first, *others = text_of(error).strip().splitlines() or [""]
    return " ".join([first, *others[-1:]])
