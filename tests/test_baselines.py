"""Every objective of baselines.py by value: by hand, against released values, and in a training run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from safetensors.torch import load_file
from torch import Tensor

import baselines
import clha
from baselines import OBJECTIVES
from program import load_tokenizer
from records import InputError, read_jsonl, write_jsonl

NAN = float("nan")
SMALL = {"batch_size": 16, "pack_tokens": 2048, "activation_checkpointing": "none"}


def cases() -> list[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
    """The released cases with their avg_logps, sum_logps and rewards, in float64."""
    return [
        (
            case,
            *(torch.tensor(case[key], dtype=torch.float64) for key in ("mean_logp", "sum_logp", "rewards")),
        )
        for case in golden("losses.json")["cases"]
    ]


def test_sft_imitates_the_reply_with_the_highest_reward() -> None:
    avg, total = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), torch.tensor([[-4.0, -6.0], [-4.0, -6.0]])
    rewards = torch.tensor([[0.5, 0.1], [-0.5, 0.1]])  # the second is not sorted
    assert OBJECTIVES["sft"](avg, total, rewards, sft_weight=0.5).tolist() == [2.0, 3.0]
    assert OBJECTIVES["sft"](avg, total, rewards, sft_weight=0.0).tolist() == [0.0, 0.0]


def test_rrhf_by_hand() -> None:
    # r = (2, 1, 1): the pairs with r_i < r_j are (2, 1) and (3, 1); the tie of 2 and 3 makes none.
    #   p_2 - p_1 = -1.5 + 2 = 0.5,   p_3 - p_1 = -3 + 2 < 0
    avg, total = torch.tensor([[-2.0, -1.5, -3.0]]), torch.tensor([[-8.0, -3.0, -3.0]])
    rewards = torch.tensor([[2.0, 1.0, 1.0]])
    assert OBJECTIVES["rrhf"](avg, total, rewards, sft_weight=0.0).item() == pytest.approx(0.5)
    assert OBJECTIVES["rrhf"](avg, total, rewards, sft_weight=1.0).item() == pytest.approx(0.5 + 8.0)
    mean = OBJECTIVES["rrhf"](avg, total, rewards, sft_weight=1.0, sft_reduction="mean")
    assert mean.item() == pytest.approx(0.5 + 2.0)


def test_rrhf_is_the_released_one() -> None:
    for case, avg, total, rewards in cases():
        released = [row["rrhf_loss"] for row in case["release"]["rrhf_rows"]]
        ours = OBJECTIVES["rrhf"](avg, total, rewards, sft_weight=0.0)
        assert ours[: len(released)].tolist() == pytest.approx(released, rel=1e-6, abs=1e-6), case["label"]
        rows = [row["rrhf_loss"] + row["sft_loss_token_mean"] for row in case["own_float64"]["rrhf_rows"]]
        whole = OBJECTIVES["rrhf"](avg, total, rewards, sft_weight=1.0, sft_reduction="mean")
        assert whole.tolist() == pytest.approx(rows, rel=1e-6), case["label"]


def test_pro_by_hand() -> None:
    # One pair, r = (2, -1): both log-probs count three times.
    #   log(exp(3 p_1) + exp(3 p_2)) - 3 p_1 = log(1 + exp(3 (p_2 - p_1)))
    avg, total = torch.tensor([[-1.0, -0.5]]), torch.tensor([[-3.0, -1.0]])
    rewards = torch.tensor([[2.0, -1.0]])
    expected = math.log(1 + math.exp(3 * 0.5))
    assert OBJECTIVES["pro"](avg, total, rewards, sft_weight=0.0).item() == pytest.approx(expected)
    with_sft = OBJECTIVES["pro"](avg, total, rewards, sft_weight=0.1)
    assert with_sft.item() == pytest.approx(expected + 0.3)


def test_pro_without_temperatures_is_equation_2_by_hand() -> None:
    avg = torch.tensor([[-1.0, -2.0, -3.0]])
    expected = math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1))
    rewards = torch.tensor([[9.0, 1.0, 0.0]])  # only their order counts
    loss = OBJECTIVES["pro"](avg, avg, rewards, sft_weight=0.0, temperatures=False)
    assert loss.item() == pytest.approx(expected)


def test_pro_is_the_released_one_where_its_epsilon_is_small() -> None:
    compared = 0
    for case, avg, total, rewards in cases():
        gaps = rewards[:, :, None] - rewards[:, None, :]
        if (gaps.clamp(min=0).amax() * -avg.amin()) > 13:  # exp(-13) is 2e-6: their 1e-10 is seen beside it
            continue
        compared += 1
        ours = OBJECTIVES["pro"](avg, total, rewards, sft_weight=0.0).mean()
        assert ours.item() == pytest.approx(case["release"]["pro"]["rank_loss"], rel=1e-4, abs=1e-4)
        alpha = case["sft_weight"] * (case["l"] - 1) ** 2
        if all(row.argmax() == i for row, i in zip(rewards, case["sft_index"], strict=True)):
            whole = OBJECTIVES["pro"](avg, total, rewards, sft_weight=alpha).mean()
            assert whole.item() == pytest.approx(case["release"]["pro"]["total"], rel=1e-4)
    assert compared > 20


def test_pro_without_temperatures_is_the_reference_value() -> None:
    for case, avg, total, rewards in cases():
        ours = OBJECTIVES["pro"](avg, total, rewards, sft_weight=0.0, temperatures=False).mean().item()
        assert ours == pytest.approx(case["own_float64"]["pro_plain_eq"]["rank_loss"], rel=1e-9, abs=1e-9)


def test_pro_does_not_drown_in_its_epsilon() -> None:
    # exp(-30) is 1e-13: the released form gives log(1e-10) + 30 = 7; the exact value is log(1 + exp(-30)).
    avg, rewards = torch.tensor([[-10.0, -20.0]]), torch.tensor([[3.0, 0.0]])
    assert OBJECTIVES["pro"](avg, avg, rewards, sft_weight=0.0).item() == pytest.approx(0.0, abs=1e-6)


def test_coh_imitates_both_texts() -> None:
    total = torch.tensor([[-4.0, -6.0]])
    assert OBJECTIVES["coh"](total / 2, total, torch.zeros(1, 2), sft_weight=0.5).tolist() == [5.0]


def test_dpo_by_hand() -> None:
    # beta = 0.5: scores 0.5 (-4 + 6) = 1 and 0.5 (-6 + 5) = -0.5
    total, reference = torch.tensor([[-4.0, -6.0]]), torch.tensor([[-6.0, -5.0]])
    rewards = torch.tensor([[1.0, 0.0]])
    settings = {"reference_logps": reference, "beta": 0.5}
    loss = OBJECTIVES["dpo"](total, total, rewards, sft_weight=0.0, **settings)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    with_sft = OBJECTIVES["dpo"](total, total, rewards, sft_weight=0.1, **settings)
    assert with_sft.item() == pytest.approx(loss.item() + 0.4)


def test_dpo_of_an_unchanged_model_knows_nothing() -> None:
    total = torch.tensor([[-4.0, -6.0], [-1.0, -9.0]])
    loss = OBJECTIVES["dpo"](
        total, total, torch.tensor([[1.0, 0.0]] * 2), sft_weight=0, reference_logps=total
    )
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(("name", "temperatures"), [*((name, True) for name in OBJECTIVES), ("pro", False)])
def test_absent_replies_change_neither_value_nor_gradient(name: str, temperatures: bool) -> None:
    avg = torch.tensor([[-1.0, -0.5, 0.0]], requires_grad=True)  # the third is none: its reward is NaN
    rewards = torch.tensor([[1.0, 0.2, NAN]])
    options: dict[str, Any] = {"pro": {"temperatures": temperatures}}.get(name, {})

    def loss(avg_logps: Tensor, rewards: Tensor, reference: Tensor) -> Tensor:
        more = {"reference_logps": reference} if name == "dpo" else {}
        return OBJECTIVES[name](avg_logps, 3 * avg_logps, rewards, sft_weight=0.3, **options, **more)

    padded = loss(avg, rewards, torch.tensor([[-2.0, -2.0, NAN]]))
    alone = loss(avg[:, :2], rewards[:, :2], torch.tensor([[-2.0, -2.0]]))
    assert padded.item() == pytest.approx(alone.item())
    (gradient,) = torch.autograd.grad(padded.sum(), avg)
    (expected,) = torch.autograd.grad(alone.sum(), avg)
    assert gradient[0].tolist() == pytest.approx(expected[0].tolist()) and expected[0, :2].abs().sum() > 0


@pytest.mark.parametrize("name", ["rrhf", "pro", "dpo"])
def test_the_ranking_term_alone_raises_the_better_reply_and_lowers_the_worse(name: str) -> None:
    avg = torch.tensor([[-2.0, -1.0]], requires_grad=True)
    more = {"reference_logps": torch.tensor([[-6.0, -3.0]])} if name == "dpo" else {}
    OBJECTIVES[name](avg, 3 * avg, torch.tensor([[1.0, 0.0]]), sft_weight=0.0, **more).sum().backward()
    assert avg.grad is not None and avg.grad[0, 0] < 0 < avg.grad[0, 1]


def test_hindsight_writes_the_best_and_the_worst_reply_in_both_orders() -> None:
    record = {"prompt": [], "responses": ["Okay.", "Bad.", "Fine."], "rewards": [0.1, -2.0, 1.5], "chosen": 1}
    texts = baselines.hindsight(record)
    assert texts["responses"] == [
        "Good answer: Fine.\n\nBad answer: Bad.",
        "Bad answer: Bad.\n\nGood answer: Fine.",
    ]
    assert len(texts["rewards"]) == 2 and texts["chosen"] == 0
    assert record["responses"] == ["Okay.", "Bad.", "Fine."]  # as it was
    tied = baselines.hindsight(record | {"rewards": [0.5, 0.5, 0.5]})["responses"]
    assert tied[0] == "Good answer: Okay.\n\nBad answer: Fine."  # no reply is both


@pytest.mark.parametrize(
    ("objective", "settings", "line"),
    [
        (
            "sft",
            {"margin": 1.0, "sft_target": "chosen"},
            "--objective sft: has no use for margin, sft_target",
        ),
        ("pro", {"sft_reduction": "mean"}, "--objective pro: has no use for sft_reduction"),
        ("coh", {"contrast": False}, "--objective coh: has no use for contrast"),
        ("dpo", {"beta": 0.0}, "--beta 0: must be above 0"),
    ],
)
def test_a_flag_that_an_objective_does_not_read_is_refused(
    objective: str, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=line):
        baselines.check_flags(clha.Config("", "", "", objective=objective, **settings))


def test_the_reference_of_dpo_knows_no_dropout(world: Path, scored: Path, tmp_path: Path) -> None:
    for path in (world / "init").iterdir():
        text = path.read_bytes()
        (tmp_path / path.name).write_bytes(
            text.replace(b'"attention_dropout": 0.0', b'"attention_dropout": 0.5')
        )
    _, _, device = clha.init_process()
    config = clha.Config(str(tmp_path), str(scored), str(tmp_path / "out"))
    examples = list(clha.load_examples(str(scored), load_tokenizer(config.model), config))[:4]
    model = clha.load_model(str(tmp_path), device, torch.float32, checkpointing="none")
    assert model.config.attention_dropout == 0.5 and model.training
    first = baselines.all_logps(model, examples, 4096)
    assert baselines.all_logps(model, examples, 4096) == first and model.training


@pytest.fixture(scope="module")
def scored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of the toy world with rewards, three replies each where there are."""
    rows = [row | {"rewards": [1.0, -0.5]} for _, row in read_jsonl(world / "train.jsonl")]
    path = tmp_path_factory.mktemp("scored") / "train.jsonl"
    write_jsonl(path, rows[:48])
    return path


def run(world: Path, data: Path, out: Path, **settings: Any) -> list[dict[str, float]]:
    """Trains for three steps; the rows of metrics.jsonl."""
    steps = {"max_steps": 3, "learning_rate": 1e-3}
    clha.train(clha.Config(str(world / "init"), str(data), str(out), **SMALL | steps | settings))
    return [row for _, row in read_jsonl(out / "metrics.jsonl")]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_trains_with_clha_py(name: str, world: Path, scored: Path, tmp_path: Path) -> None:
    rows = run(world, scored, tmp_path / "out", objective=name, dev_data=str(scored), eval_every=3)
    assert (tmp_path / "out/final/model.safetensors").is_file() and len(rows) == 3
    assert rows[0]["grad_norm"] > 0 and math.isfinite(rows[-1]["eval/loss"])
    before, after = (load_file(p / "model.safetensors") for p in (world / "init", tmp_path / "out/final"))
    assert all((after[weight] != before[weight]).any() for weight in after)  # embeddings and norms too
    alpha = json.loads((tmp_path / "out/config.json").read_text())["alpha"]
    assert alpha == {"sft": 1, "rrhf": 1, "coh": 1, "dpo": 0, "pro": 0.05}[name]
    if name == "dpo":  # at the first step the model is its own reference
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[-1]["eval/loss"] < math.log(2)


def test_the_loss_of_a_run_is_the_mean_of_the_objective(world: Path, scored: Path, tmp_path: Path) -> None:
    rows = run(world, scored, tmp_path / "sft", objective="sft", batch_size=48, max_steps=1)
    _, _, device = clha.init_process()
    config = clha.Config(str(world / "init"), str(scored), str(tmp_path / "out"), objective="sft")
    examples = clha.load_examples(str(scored), load_tokenizer(config.model), config)
    model = clha.load_model(config.model, device, torch.float32, checkpointing="none")
    sum_logps, _ = clha.sequence_logps(model, clha.pack(examples))
    assert rows[0]["loss"] == pytest.approx(-sum_logps[:, 0].mean().item(), rel=1e-5)


def test_settings_of_an_objective_reach_it(world: Path, scored: Path, tmp_path: Path) -> None:
    def first(out: str, **settings: Any) -> float:
        return run(world, scored, tmp_path / out, max_steps=1, **settings)[0]["loss"]

    rrhf = {"objective": "rrhf", "alpha": 1.0}
    assert first("a", **rrhf) > 4 * first("b", **rrhf, sft_reduction="mean")
    pro = {"objective": "pro", "alpha": 0.0}
    assert first("c", **pro) != pytest.approx(first("d", **pro, temperatures=False), rel=1e-3)
    dpo = {"objective": "dpo", "max_steps": 2}
    steps = [
        run(world, scored, tmp_path / name, **dpo, beta=b)[1]["loss"] for name, b in (("e", 0.1), ("f", 1))
    ]
    assert abs(steps[1] - math.log(2)) > 2 * abs(steps[0] - math.log(2)) > 0
