"""Table 1 counts what is there: every timeline once, pairs and tokens as the template has them."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_up import make_dialogue

from data_gen.dialogues import Dialogue
from data_gen.rewriter import TemplateRewriter
from data_gen.stats import read_stats, table, write_histograms
from data_gen.table1 import PAPER, TOTAL
from duplex_jax.errors import UserError
from duplex_jax.template import make_template, missing_tokens
from duplex_jax.timeline import dump_line, from_row
from duplex_jax.tokenizer import Tokenizer


@pytest.mark.parametrize("workers", [1, 2])
def test_every_timeline_is_counted_once(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, workers: int):
    # A vocabulary of no known family gets the compact template, with the tokens that it lacks.
    template = make_template("compact", tokenizer.with_tokens(missing_tokens("compact", tokenizer)))
    pairs, tokens = [], []
    for n in range(7):
        lines = []
        for i in range(3):
            slices = ["hello there you", "<idle>"] * (n + i + 1)
            row = {"output": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 99, slices)]}  # noqa: B905
            lines.append(json.dumps(row))
            pairs.append(n + i + 1)
            tokens.append(len(template.encode(from_row(row)).ids))
        (tmp_path / f"generation-termination_{n}.jsonl").write_text("\n".join(lines) + "\n")
    stats = read_stats(tmp_path, str(tokenizer_folder), workers)
    found = stats.categories["generation_termination"]
    assert found.dialogues == 21
    assert found.average_pairs == pytest.approx(np.mean(pairs))
    assert found.average_tokens == pytest.approx(np.mean(tokens))
    text = "\n".join(table(stats))
    assert "1,468,141" in text
    assert "89.3" in text
    assert "warning: generation_termination" in text


def test_the_papers_own_figures_agree_with_each_other():
    assert sum(row.dialogues for row in PAPER.values()) == TOTAL.dialogues
    assert sum(r.dialogues * r.pairs for r in PAPER.values()) / TOTAL.dialogues == pytest.approx(TOTAL.pairs, abs=1.0)


def test_the_papers_table_is_the_papers(shared: Path):
    paper = (shared / "paper.txt").read_text()
    for name, row in PAPER.items():
        line = next(x for x in paper.splitlines() if x.lower().startswith(name.replace("_", " ") + "\t"))
        cells = [float(c.replace(",", "")) for c in line.split("\t")[-3:]]
        assert cells == list(row)


def test_histograms(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path):
    pytest.importorskip("matplotlib")
    from random import Random

    from data_gen.categories import basic
    from data_gen.compose import Conversation

    made = [basic.make([make_dialogue(i)], Conversation(Random(i), tokenizer), TemplateRewriter()) for i in range(5)]
    (tmp_path / "basic.jsonl").write_text("".join(map(dump_line, made)))
    write_histograms(read_stats(tmp_path, str(tokenizer_folder)), tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_count(tmp_path: Path, tokenizer_folder: Path, dialogues: list[Dialogue]):
    with pytest.raises(UserError, match="holds no"):
        read_stats(tmp_path, str(tokenizer_folder))
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="1 lines are not timelines"):
        read_stats(tmp_path, str(tokenizer_folder))
