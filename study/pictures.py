"""The pictures that explain CLHA, drawn by calls to clha.py: mask of a pack, hinge, rewards.

    python -m study.pictures --out docs/pictures   mask.png, hinge.png, rewards.png; needs matplotlib

They are gray, so that they can be printed. docs/walkthrough.ipynb draws them from its own record.
"""

from pathlib import Path
from typing import Any

import torch

import clha
import reward
from clha import Example
from study import toy


def mask(examples: list[Example], tokenizer: clha.Tokenizer) -> Any:
    """Which token of a pack (row) sees which (column): prompts light, each response in a shade of its own."""
    pyplot = reward.import_pyplot()
    pack = clha.pack(examples)
    tokens = [repr(tokenizer.decode([i]))[1:-1] for i in pack.input_ids[0].tolist()]
    shades = []
    for example in examples:
        shades += [0.25] * len(example["prompt_ids"])
        for i, ids in enumerate(example["response_ids"]):
            shades += [0.45 + 0.2 * i] * len(ids)
    sees = torch.block_diag(*[part.float() for part in pack.mask])  # (N, N)
    side = 2 + 0.17 * len(tokens)
    figure, axes = pyplot.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(sees * torch.tensor(shades), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=8)
    axes.set_title("The row's token sees the column's")
    return figure


def hinge(margin: float) -> Any:
    """The loss of a pair over the lead of its better response, one and two places apart (Eq. 4 to 6)."""
    pyplot = reward.import_pyplot()
    lead = torch.linspace(-1, 1, 201)  # p_i - p_j
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for places, style in ((1, "-"), (2, "--")):
        scores = torch.zeros(len(lead), places + 1)
        scores[:, 0] = lead
        keep = torch.zeros(len(lead), places + 1, places + 1, dtype=torch.bool)
        keep[:, 0, places] = True
        loss = clha.pairwise_margin_loss(scores, keep, margin)
        axes.plot(lead, loss, style, color="black", label=f"{places} place{'s' * (places > 1)} apart")
    axes.axvline(0, color="0.8")
    axes.set(xlabel="lead $p_i - p_j$ of the better response (nats per token)", ylabel="loss")
    axes.set_title(f"Loss of a pair, margin {margin:g}")
    axes.legend()
    return figure


def main() -> None:
    """Draws all of them on a small toy world."""
    parser = reward.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the pictures")
    args = parser.parse_args()
    reward.check_output(args.out, "folder")
    splits = toy.make_splits(0, queries=400)
    tokenizer = toy.train_tokenizer(toy.texts_of(splits["pretrain"]))
    # In this world the true reward of any text is known.
    records = [record | {"rewards": toy.golds(record)} for record in splits["train"]]
    config = clha.Config("", "", "")
    examples = []
    for question, responses in (("How?", ["Go on.", "Stop.", "No."]), ("Why?", ["So.", "No."])):
        prompt = [{"role": "user", "content": question}]
        record = {"id": question, "prompt": prompt, "responses": responses}
        examples.append(clha.encode(record, tokenizer, config))
    figures = {
        "mask": mask(examples, tokenizer),
        "hinge": hinge(config.margin),
        "rewards": reward.draw_rewards(records),
    }
    for name, figure in figures.items():
        reward.save_picture(figure, str(args.out / f"{name}.png"))
    print(f"drew {', '.join(figures)} into {args.out}")


if __name__ == "__main__":
    clha.run(main)
