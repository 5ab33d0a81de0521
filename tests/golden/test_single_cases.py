"""Loss, logits, vectors and every gradient of the official code on single batches, in float64."""

import pytest
import torch
from safetensors.torch import load_file
from support.folders import GOLDEN
from support.official import (
    build_encoder,
    build_mlm_head,
    lm_name,
    official_state,
    read_json,
    tokens_of,
    views_of,
    worst,
)
from torch.nn import functional as F

from promcse_pl.config import LossConfig
from promcse_pl.data.masking import IGNORED
from promcse_pl.losses.contrastive import ntxent_logits
from promcse_pl.losses.hybrid import hybrid_loss, mlm_loss

pytestmark = pytest.mark.golden
CASES = sorted(path.parent for path in GOLDEN.glob("[0-9]*_*/outputs.safetensors"))
TOLERANCE, FLOAT32_TOLERANCE = 1e-9, 1e-5
WORST: dict[str, float] = {}
WHAT = f"{len(CASES)} single cases"


def check(kind, ours, official, tolerance=TOLERANCE):
    error = worst(ours, official)
    WORST[kind] = max(WORST.get(kind, 0.0), error)
    assert error <= tolerance, f"{kind}: {error:.2e}"


@pytest.mark.parametrize("chunk_tokens", [None, 30], ids=["plain", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_official_code(case, chunk_tokens):
    args, expected = read_json(case / "args.json"), read_json(case / "loss.json")
    state, outputs = official_state(case), load_file(case / "outputs.safetensors")
    encoder = build_encoder(case, state, args).train()
    tokens, views = tokens_of(load_file(case / "inputs.safetensors"))
    vectors, hidden = encoder(tokens, train_head=True, chunk_tokens=chunk_tokens)
    anchor, positive, negative = views_of(vectors, views)

    # the official code adds the hard-negative logit as a float32 constant
    hard_negative_logit = torch.tensor(args["hard_negative_weight"], dtype=torch.float32).item() if views == 3 else 0.0
    mlm = head = None
    if args["do_mlm"]:
        head = build_mlm_head(encoder, state)
        labels = tokens.mlm_labels_NT
        mlm = mlm_loss(head(hidden), labels[labels != IGNORED])
    parts = hybrid_loss(
        anchor, positive, negative,
        LossConfig(
            temperature=args["temp"],
            margin=args["eh_loss_margin"] or 0.0,
            hinge_weight=args["eh_loss_weight"] if args["do_eh_loss"] else 0.0,
            hard_negative_logit=hard_negative_logit,
        ),
        mlm=None if mlm is None else args["mlm_weight"] * mlm,
    )  # fmt: skip
    unit = [None if x is None else F.normalize(x, dim=1) for x in (anchor, positive, negative)]
    logits = ntxent_logits(*unit, temperature=args["temp"], hard_negative_logit=hard_negative_logit)
    check("logits", logits, outputs["logits"])
    check("loss", parts.total, torch.tensor(expected["loss"], dtype=torch.float64))
    check("contrastive", parts.contrastive, torch.tensor(expected["cross_entropy"], dtype=torch.float64))
    if args["do_eh_loss"]:
        check("hinge", parts.hinge / args["eh_loss_weight"], torch.tensor(expected["eh_hinge"], dtype=torch.float64))
    if mlm is not None:
        check("mlm", parts.mlm, torch.tensor(expected["mlm_weighted"], dtype=torch.float64))

    if parts.total.requires_grad:  # nothing is trained with prompt length 0 and no head
        parts.total.backward()
    ours = {f"prefix_encoder.{name.removeprefix('prompt.')}" if name.startswith("prompt.") else f"mlp.{name[5:]}": p.grad
            for name, p in encoder.named_parameters() if p.requires_grad}  # fmt: skip
    if head is not None:
        ours |= {f"lm:{name}": p.grad for name, p in head.named_parameters()}
    seen = set()
    for key, gradient in outputs.items():
        prefix, _, name = key.partition(".")
        if prefix not in ("grad", "grad_rows8"):
            continue
        if name.startswith("lm_head."):
            name = f"lm:{lm_name(name)}"
        seen.add(name)
        if gradient.numel() == 0:
            continue
        grad = ours[name][: len(gradient)] if prefix == "grad_rows8" else ours[name]
        check("gradient", grad, gradient, TOLERANCE if gradient.dtype == torch.float64 else FLOAT32_TOLERANCE)
    assert set(ours) <= seen, "a trained parameter has no official gradient"

    encoder.eval()
    vectors, _ = encoder(tokens, chunk_tokens=chunk_tokens)
    flat = vectors.view(views, -1, vectors.shape[1]).transpose(0, 1).flatten(0, 1)
    key = "sent_emb_mlp_only_train" if encoder.head_mode == "mlp_train_only" else "sent_emb"
    check("test-time vectors", flat, outputs[key])
