"""Fill the documents' tables in from the result files: ``python benchmarks/tables.py`` (make tables).

A table is found by its page and first line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import table_rows as rows  # noqa: E402
from benchmarks import video_rows  # noqa: E402

NOTES, GUIDE, README, README_ZH = "benchmarks/NOTES.md", "docs/presets.md", "README.md", "README_zh.md"


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Args:
        page: The page, relative to the repository.
        header: The table's first line.
        rows: Makes the cells of all rows below it.
    """

    page: str
    header: str
    rows: Callable[[], rows.Rows]


TABLES = (
    Table(README, "| | tokens | dense | PSA | faster | error |", rows.speed),
    Table(README_ZH, "| | token 数 | 稠密 | PSA | 快 | 误差 |", rows.speed),
    Table(README, "| | ComfyUI's default | dense, cuDNN | PSA | faster than the default |", rows.seconds),
    Table(README_ZH, "| | ComfyUI 默认 | 稠密，cuDNN | PSA | 比默认快 |", rows.seconds),  # noqa: RUF001
    Table(GUIDE, "| levels | noise 0.9 | 0.6 | 0.3 |", rows.level_sets),
    Table(GUIDE, "| `error_weight` | noise 0.9: density, error | 0.6 | 0.3 |", rows.error_weights),
    Table(GUIDE, "| | noise 0.9 | 0.6 | 0.3 |", rows.presets),
    Table(GUIDE, "| dense at first | 100% | 30% | 20% | 10% | 0% |", rows.start_percents),
    Table(NOTES, "| version of the attention kernel | tile, warps, stages | D 128 mixed | D 64 mixed |", rows.versions),
    Table(NOTES, "| change | expected | D 128 | D 64 |", rows.settings_on_h200),
    Table(NOTES, "| | expected | measured |", rows.few_blocks),
    Table(NOTES, "| | wanted | hoped for | measured |", rows.targets),
    Table(NOTES, "| choice | noise .9 | .6 | .3 |", rows.choices),
    Table(NOTES, "| tokens, noise | error | `sol_attn` | PSA, H100 | share | density | share, H200 |", rows.sol_attn),
    Table(NOTES, "| error_weight | 32760 tokens | 4992 tokens |", rows.error_weights_of_two_lengths),
    Table(NOTES, *rows.crossovers_table()),
    Table(NOTES, "| | head dim 128 | 64 |", rows.first_use),
    Table(NOTES, "| preset | density | PSNR | SSIM |", rows.demo_presets),
    Table(NOTES, "| keys and masses | noise .9 (worst head), time | .6 | .3 |", video_rows.content_choices),
    Table(NOTES, "| settings | first model: work, PSNR | second |", video_rows.tuning),
    Table(NOTES, "| preset | first model: work, PSNR | second |", video_rows.whole_videos),
    Table(NOTES, "| method | first model |", video_rows.sol_videos),
    Table(README, "| 50 steps of Wan 2.1 14B, 1280x720, 81 frames | seconds | faster |", video_rows.fifty_steps),
    Table(README_ZH, "| Wan 2.1 14B，1280x720，81 帧，50 步 | 秒 | 快 |", video_rows.fifty_steps),  # noqa: RUF001
)


def tables_in(text: str) -> list[str]:
    """The first lines of a page's tables."""
    return re.findall(r"^(\|.*\|)\n\|[-|]+\|$", text, re.MULTILINE)


def filled(text: str, table: Table) -> str:
    """A page with the cells of a table as they are measured.

    Raises:
        ValueError: the page has no such table, or one with another number of rows or columns.
    """
    lines = text.split("\n")
    if table.header not in lines:
        raise ValueError(f"{table.page} has no table {table.header}")
    first = lines.index(table.header) + 2
    for number, cells in enumerate(table.rows(), first):
        written = [cell.strip() for cell in lines[number].split("|")[1:-1]]
        if len(written) != len(cells):
            raise ValueError(f"{table.page}, line {number + 1}: not a row of {len(cells)} cells")
        kept = (old if new is None else new for old, new in zip(written, cells, strict=True))
        lines[number] = "|" + "|".join(f" {cell} " if cell else " " for cell in kept) + "|"
    if lines[number + 1].startswith("|"):
        raise ValueError(f"{table.page}, line {number + 2}: a row that nothing was measured for")
    return "\n".join(lines)


def main() -> None:
    for table in TABLES:
        path = ROOT / table.page
        before = path.read_text("utf-8")
        path.write_text(filled(before, table), "utf-8")
        print(f"{table.page}: {table.header}" + ("" if path.read_text("utf-8") == before else "  changed"))


if __name__ == "__main__":
    main()
