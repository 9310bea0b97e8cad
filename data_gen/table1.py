"""Table 1 of the paper: dialogues, average slice pairs and average tokens by category."""

from typing import NamedTuple


class Row(NamedTuple):
    """Figures of one category; tokens are those of MiniCPM-duplex's tokenizer."""

    dialogues: int
    pairs: float
    tokens: float


PAPER = {
    "basic": Row(1_458_353, 153.9, 2_342.2),
    "topic_interweaving": Row(489_065, 427.7, 6_819.6),
    "generation_termination": Row(1_468_141, 89.3, 1_318.0),
    "regeneration": Row(806_687, 171.2, 2_590.4),
    "dialogue_reset": Row(300_318, 194.7, 2_906.5),
    "back_on_topic": Row(327_286, 199.1, 2_495.6),
}
TOTAL = Row(4_849_850, 170.4, 2_570.2)
