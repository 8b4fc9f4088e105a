"""Trains the demo model's text encoder to represent the layout of a scene, before the UNet is trained.

A temporary head has one query for each of the nine places and one for the background. They attend to the token
embeddings, as the UNet will, and predict colour, shape and size of the object there. A denoiser trained from scratch
learns very late which of two objects goes where, because the noisy image reveals it unless the noise is nearly pure.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import nn
from torch.nn.functional import cross_entropy

from data import loosen, training_sentence
from ldm_export_demo.grammar import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Sentence,
    held_out_prompts,
    parse,
)
from run import Run, Training
from text import TOKENS, make_tokenizer, token_ids, vocabulary

WIDTH = 128
BERT = {
    "vocab_size": len(vocabulary()),
    "max_position_embeddings": TOKENS,
    "d_model": WIDTH,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "head_dim": 32,
    "encoder_ffn_dim": 512,
    "dropout": 0.0,
}
BATCH = 128
NAMES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
UNSPECIFIED = -100
"""Label of attributes that a sentence leaves open: cross_entropy's ignore_index."""
SIDES = {
    "left of": ((0, 1), (2, 1)),
    "correct of": ((2, 1), (0, 1)),
    "above": ((1, 0), (1, 2)),
    "below": ((1, 2), (1, 0)),
}
"""Relation to the (column, row) of the first and of the second object on the 3×3 grid."""


def new_text_encoder() -> LDMBertModel:
    """The text encoder with fresh weights."""
    return LDMBertModel(LDMBertConfig(**BERT))


class Reader(nn.Module):
    """Reads places and background out of token embeddings [B, T, WIDTH] with one attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(PLACES) + 1, WIDTH) * 0.1)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.hidden = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        # One class more than names: no object at this place.
        self.names = nn.ModuleDict({key: nn.Linear(WIDTH, len(names) + 1) for key, names in NAMES.items()})
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS))

    def forward(self, context: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits: for each of NAMES [B, classes, 9], for "background" [B, classes]."""
        queries = self.queries.expand(len(context), -1, -1)
        hidden = self.hidden(self.attention(queries, context, context, need_weights=False)[0])
        logits = {key: head(hidden[:, :-1]).transpose(1, 2) for key, head in self.names.items()}
        return {**logits, "background": self.background(hidden[:, -1])}


def truth(sentence: Sentence) -> dict[str, np.ndarray]:
    """Labels of a sentence: for each of NAMES int64 [9], for "background" int64 []; LEFT_OPEN where left open."""
    labels = {key: np.full(len(PLACES), len(names)) for key, names in NAMES.items()}
    cells = list(PLACES.values())
    where = SIDES.get(sentence.relation or "") or (PLACES.get(sentence.place or ""),)
    for thing, place in zip(sentence.things, where, strict=True):
        for key, names in NAMES.items():
            name = getattr(thing, key)
            if place is None:
                labels[key][:] = UNSPECIFIED
            else:
                labels[key][cells.index(place)] = UNSPECIFIED if name is None else names.index(name)
    has_background = sentence.background is not None
    labels["background"] = np.array(BACKGROUNDS.index(sentence.background) if has_background else UNSPECIFIED)
    return labels


def labels_of(sentences: list[Sentence]) -> dict[str, torch.Tensor]:
    """Stack the labels of a batch."""
    each = [truth(sentence) for sentence in sentences]
    return {key: torch.from_numpy(np.stack([labels[key] for labels in each])) for key in each[0]}


@torch.no_grad()
def share_correct(model: nn.ModuleDict, ids: torch.Tensor, labels: dict[str, torch.Tensor]) -> float:
    """Share of sentences for which all attributes are predicted correctly."""
    logits = model["reader"](model["bert"](ids)[0])
    correct = [(logits[key].argmax(1) == labels[key]).reshape(len(ids), -1).all(1) for key in labels]
    return torch.stack(correct).all(0).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/training/text"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.folder / "tokenizer")
    model = nn.ModuleDict({"bert": new_text_encoder(), "reader": Reader()})
    average = deepcopy(model)
    run = Run(args.folder, model, average, Training(steps=args.steps, seed=args.seed, decay=0.99))
    held_out = [parse(prompt) for prompt in held_out_prompts(200, 800)]
    held_out_ids, held_out_labels = token_ids(tokenizer, [str(sentence) for sentence in held_out]), labels_of(held_out)

    def loss_of_step(step: int, _: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([args.seed, step])
        sentences = [loosen(training_sentence(rng), rng) for _ in range(BATCH)]
        ids, labels = token_ids(tokenizer, [str(sentence) for sentence in sentences]), labels_of(sentences)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model["reader"](model["bert"](ids)[0])
        if step % 250 == 0:
            print(f"step {step}: {share_correct(average, held_out_ids, held_out_labels):.1%} of held-out sentences")
        return sum(cross_entropy(logits[key].float(), labels[key]) for key in labels)

    run.train(loss_of_step)
    print(f"{share_correct(average, held_out_ids, held_out_labels):.1%} of {len(held_out)} held-out sentences correct")
    average["bert"].save_pretrained(args.folder / "model")


if __name__ == "__main__":
    main()
