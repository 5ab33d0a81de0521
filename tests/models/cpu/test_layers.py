"""The fused CPU layers compute the values and gradients of transformers' modules, and are not used when those have hooks."""

import copy
from contextlib import contextmanager

import pytest
import torch
from support.encoders import NO_DROPOUT, save_small_encoder, small_backbone, small_encoder, small_tokens
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.bert.modeling_bert import BertSelfAttention

from promcse_pl.config import Config
from promcse_pl.models import families
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.cpu.dropout import seeded_dropout
from promcse_pl.models.cpu.layers import can_fuse
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.hooks import has_hooks
from promcse_pl.models.identity import EncoderId
from promcse_pl.training.fit import build_encoder

FAMILIES = ["bert", "roberta", "xlm-roberta", "mpnet"]
LENGTHS = {"padded": [9, 4, 12, 5, 9, 3], "equal": [7, 7, 7, 7], "one": [5], "one token": [1, 1]}
every_family = pytest.mark.parametrize("family", FAMILIES)
all_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@contextmanager
def library_layers(encoder):
    encoder.backbone.use_fused_layers = False
    yield
    encoder.backbone.use_fused_layers = True


def prompt_encoder(family="bert", *, pooling="avg", dropout=None, **changes) -> PromptEncoder:
    frozen = small_backbone(family, **changes)
    torch.manual_seed(7)
    for parameter in frozen.model.parameters():  # biases are 0 and norms 1 in a fresh encoder
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    assert can_fuse(frozen.model, frozen.family.fused)
    return PromptEncoder(frozen, length=4, pooling=pooling, dropout=dropout, projection_size=6)


def vectors_and_gradients(encoder, tokens, seed=None):
    parameters = list(encoder.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    encoder.zero_grad()
    with seeded_dropout(seed, torch.device("cpu")):
        (vectors,) = encoder.encode_chunk(tokens, encoder.prompt())
    weights_ND = torch.linspace(-1, 1, vectors.numel(), dtype=vectors.dtype).view_as(vectors)
    (vectors * weights_ND).sum().backward()
    assert all(parameter.grad is None for parameter in parameters if not parameter.requires_grad)
    return vectors.detach(), [parameter.grad.clone() for parameter in trained]


def assert_equal(found, expected, bound):
    assert (found[0] - expected[0]).norm() <= bound * expected[0].norm()
    assert len(found[1]) == len(expected[1]) == 5
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= bound * theirs.norm()


@every_family
@all_lengths
@pytest.mark.parametrize("pooling", ["cls", "avg", "avg_top2", "avg_first_last"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_vectors_and_every_gradient_are_those_of_transformers(family, lengths, pooling, dtype, bound):
    encoder = prompt_encoder(family, pooling=pooling).to(dtype).eval()
    tokens = small_tokens(lengths, encoder.backbone.pad_id)
    found = vectors_and_gradients(encoder, tokens)
    with library_layers(encoder):
        assert_equal(found, vectors_and_gradients(encoder, tokens), bound)
    with torch.inference_mode():  # another path: fused attention, nothing kept
        (vectors,) = encoder.encode_chunk(tokens, encoder.prompt())
    torch.testing.assert_close(vectors, found[0], rtol=0, atol=bound)


@every_family
@pytest.mark.parametrize("prompt_dropout", [0.0, 0.1])
def test_with_the_same_masks_vectors_and_every_gradient_are_those_of_transformers(family, prompt_dropout):
    encoder = prompt_encoder(family, dropout=prompt_dropout, attention_probs_dropout_prob=0.3).double().train()
    tokens = small_tokens(LENGTHS["equal"], encoder.backbone.pad_id)  # without padding both draw alike
    found = vectors_and_gradients(encoder, tokens, seed=3)
    other = vectors_and_gradients(encoder, tokens, seed=4)
    with library_layers(encoder):
        assert_equal(found, vectors_and_gradients(encoder, tokens, seed=3), 1e-12)
    assert (found[0] - other[0]).norm() > 0.1 * found[0].norm()


@all_lengths
@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_with_dropout_the_gradient_is_the_slope_of_the_loss(lengths, pooling):
    encoder = prompt_encoder(pooling=pooling, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    encoder.double().train()
    tokens = small_tokens(lengths)
    _, gradients = vectors_and_gradients(encoder, tokens, seed=3)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(5)
    for parameter, gradient in zip(trained, gradients, strict=True):
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(way, alpha=step)
            vectors, _ = vectors_and_gradients(encoder, tokens, seed=3)
            weights_ND = torch.linspace(-1, 1, vectors.numel(), dtype=torch.float64).view_as(vectors)
            losses.append(float((vectors * weights_ND).sum()))
            with torch.no_grad():
                parameter.sub_(way, alpha=step)
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(float((gradient * way).sum()), rel=1e-6)


def test_without_a_prompt_the_states_are_those_of_transformers():
    frozen = small_backbone(**NO_DROPOUT).double()
    tokens = small_tokens(LENGTHS["padded"])
    real_NT = tokens.mask_NT.bool()
    whole = frozen.model(tokens.ids_NT, attention_mask=tokens.mask_NT, output_hidden_states=True).hidden_states
    states = frozen(tokens.ids_NT, tokens.mask_NT, None, all_layers=True)
    for ours, theirs in zip(states, whole, strict=True):
        torch.testing.assert_close(ours[real_NT], theirs[real_NT], rtol=0, atol=1e-12)
    assert not states[-1][~real_NT].any()


@every_family
def test_bfloat16_is_as_near_to_float32_as_transformers_is(family):
    exact = prompt_encoder(family).eval()
    for (
        parameter
    ) in exact.prompt.parameters():  # with a prompt near 0 the gradients are differences near the rounding error
        parameter.data.normal_(std=0.3)
    rounded = copy.deepcopy(exact)
    rounded.backbone.bfloat16()
    tokens = small_tokens(LENGTHS["padded"], exact.backbone.pad_id)
    expected, gradients = vectors_and_gradients(exact, tokens)
    ours = vectors_and_gradients(rounded, tokens)
    with library_layers(rounded):
        theirs = vectors_and_gradients(rounded, tokens)
    for number, whole in enumerate([expected, *gradients]):
        error, other = ((([found[0], *found[1]][number] - whole).norm() / whole.norm()) for found in (ours, theirs))
        assert error <= max(2 * other, 0.004)


@pytest.mark.parametrize(
    "change", ["one padded sentence", "one head", "types", "nothing but padding", "padding in front"]
)
@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_edge_case_batches_equal_those_of_transformers(change, pooling):
    changes = {"num_attention_heads": 1} if change == "one head" else {}
    encoder = prompt_encoder(pooling=pooling, **changes).double().eval()
    tokens = small_tokens([6, 4, 3])
    if change == "one padded sentence":
        tokens = tokens.select(torch.tensor([1]), 6)
    elif change == "types":
        tokens.types_NT = torch.arange(6).expand(3, -1) % 2
    elif change == "nothing but padding" and pooling == "cls":  # the mean of no token is not a number
        tokens.mask_NT[1] = 0
    elif change == "padding in front":
        tokens.mask_NT[2, :2] = 0
    found = vectors_and_gradients(encoder, tokens)
    with library_layers(encoder):
        expected = vectors_and_gradients(encoder, tokens)
    rows = tokens.mask_NT[:, 0].bool() if pooling == "cls" else slice(None)  # what padding is turned into means nothing
    torch.testing.assert_close(found[0][rows], expected[0][rows], rtol=0, atol=1e-12)
    if change not in ("nothing but padding", "padding in front"):
        assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("then", ["to", "deepcopy", "assign", "replace"])
def test_changed_weights_are_used(then):
    encoder = prompt_encoder().eval()
    tokens = small_tokens(LENGTHS["padded"])
    before, _ = vectors_and_gradients(encoder, tokens)
    model = encoder.backbone.model
    own = model.encoder.layer[0].attention.self
    if then == "to":
        model.double()
    elif then == "deepcopy":
        encoder = copy.deepcopy(encoder)
        encoder.backbone.model.encoder.layer[0].attention.self.key.weight.data.mul_(2)
    elif then == "assign":
        state = {name: tensor * 2 for name, tensor in model.encoder.state_dict().items()}
        model.encoder.load_state_dict(state, assign=True)
        model.requires_grad_(False)
    else:
        own.query.weight = torch.nn.Parameter(own.query.weight * 2, requires_grad=False)
    assert can_fuse(encoder.backbone.model, encoder.backbone.family.fused)
    found, _ = vectors_and_gradients(encoder, tokens)
    with library_layers(encoder):
        expected, _ = vectors_and_gradients(encoder, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert then == "to" or (found - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize(
    ("family", "changes"),
    [("electra", {}), ("modernbert", {}), ("bert", {"hidden_act": "relu"})],
    ids=["electra", "modernbert", "relu"],
)
def test_other_layers_are_left_to_transformers(family, changes):
    frozen = small_backbone(family, **changes)
    assert not can_fuse(frozen.model, frozen.family.fused)


def test_a_layer_of_a_subclass_is_left_to_transformers():
    class LoggedSelfAttention(BertSelfAttention):
        pass

    model = small_backbone().model
    model.encoder.layer[1].attention.self.__class__ = LoggedSelfAttention
    assert not can_fuse(model, families.FAMILIES["bert"].fused)


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "forward pre": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "full backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "full backward pre": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "global": lambda _, seen: register_module_forward_hook(
        lambda module, *_: seen.append(1) if isinstance(module, BertSelfAttention) else None
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", ["attention.self", "attention.output", "intermediate", ""])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_any_module_is_called_for_every_token_whenever_it_was_registered(kind, part, when):
    model, seen = small_encoder("bert"), []
    layer = model.encoder.layer[2].get_submodule(part)
    if when == "before":
        handle = HOOKS[kind](layer, seen)
    encoder = PromptEncoder(FrozenBackbone(model, EncoderId("small", None, "0" * 64)), length=4, pooling="cls").eval()
    tokens = small_tokens(LENGTHS["padded"])
    shapes = []
    if when == "after":
        vectors_and_gradients(encoder, tokens)  # once with the fused layers
        handle = HOOKS[kind](layer, seen)
    if kind == "forward":
        layer.register_forward_hook(lambda _module, _inputs, output: shapes.append(torch.as_tensor(output[0]).shape))
    seen.clear()
    hooked, _ = vectors_and_gradients(encoder, tokens)
    handle.remove()
    layer._forward_hooks.clear()
    assert seen
    assert all(max(LENGTHS["padded"]) in shape for shape in shapes)  # all tokens, although `cls` reads one
    seen.clear()
    fused, _ = vectors_and_gradients(encoder, tokens)
    assert not seen
    torch.testing.assert_close(hooked, fused, rtol=0, atol=1e-5)


def test_a_replaced_forward_is_called():
    encoder = prompt_encoder().eval()
    attention = encoder.backbone.model.encoder.layer[0].attention.self
    calls, forward = [], attention.forward
    attention.forward = lambda *args, **options: (calls.append(1), forward(*args, **options))[1]
    vectors_and_gradients(encoder, small_tokens([3]))
    assert calls
    attention.forward = forward  # restored, as older versions of transformers do after they record hidden states
    assert not has_hooks(encoder.backbone.model)


def test_the_hooks_that_transformers_registers_to_record_hidden_states_do_not_count():
    encoder = prompt_encoder(pooling="avg_first_last").eval()
    with library_layers(encoder):
        vectors_and_gradients(encoder, small_tokens([3]))
    assert not has_hooks(encoder.backbone.model)


def test_int8_autocast_and_trained_weights_are_left_to_transformers():
    model = small_backbone().model
    assert can_fuse(model, families.FAMILIES["bert"].fused)
    with torch.autocast("cpu"):
        assert not can_fuse(model, families.FAMILIES["bert"].fused)
    model.encoder.layer[1].output.dense.bias.requires_grad_(True)
    assert not can_fuse(model, families.FAMILIES["bert"].fused)
    quantized = small_backbone()
    quantized.quantize()
    assert not can_fuse(quantized.to("cpu").model, families.FAMILIES["bert"].fused)


@pytest.mark.parametrize(("layers", "fused"), [("auto", True), ("library", False)])
def test_the_setting_trainer_layers_chooses_the_layers(tmp_path, layers, fused):
    model = {"path": str(save_small_encoder(tmp_path))}
    data = {"kind": "pairs", "train": "x.csv"}
    config = {"model": model, "data": data, "loss": {"hinge_weight": 0.0}, "trainer": {"layers": layers}}
    assert build_encoder(Config.from_dict(config)).backbone.use_fused_layers == fused
