"""Mean keys and values of the last token, which initialise the prompt with `prompt.init=data`."""

import pytest
import torch
from support.encoders import small_backbone, small_tokens
from support.runs import run_small

from promcse_pl.adapter import load_adapter
from promcse_pl.models.backbone import SUPPORTED
from promcse_pl.models.prompt import DeepPrompt

LENGTHS = [7, 3, 5]


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_gives_a_key_and_value_of_each_layer_that_padding_does_not_change(family):
    backbone = small_backbone(family).eval()
    tokens = small_tokens(LENGTHS, backbone.pad_id)
    kv = backbone.last_token_keys_values(tokens.ids_NT, tokens.mask_NT, 0)
    assert kv.shape == (backbone.layers, 2, backbone.kv_heads, backbone.head_size)
    assert all(part.abs().max() > 0 for layer in kv for part in layer)
    assert len({tuple(layer.flatten().tolist()) for layer in kv}) == backbone.layers
    singles = []
    for row, length in enumerate(LENGTHS):
        ids = tokens.ids_NT[row : row + 1, :length]
        singles.append(backbone.last_token_keys_values(ids, torch.ones_like(ids), 0))
    torch.testing.assert_close(kv, torch.stack(singles).mean(0), rtol=1e-4, atol=1e-5)
    assert backbone.use_fused_layers


def test_keys_and_values_are_the_projections_of_the_hidden_states():
    backbone = small_backbone().eval()
    tokens = small_tokens([6])
    kv = backbone.last_token_keys_values(tokens.ids_NT, tokens.mask_NT, 2)
    states = backbone(tokens.ids_NT, tokens.mask_NT, None, position_offset=2, all_layers=True)
    for layer, module in enumerate(backbone.model.encoder.layer):
        for part, name in enumerate(("key", "value")):
            projected = getattr(module.attention.self, name)(states[layer][0, -1]).view(backbone.heads, -1)
            torch.testing.assert_close(kv[layer, part], projected, rtol=1e-4, atol=1e-5)


def test_all_slots_are_moved_and_keep_their_noise():
    torch.manual_seed(0)
    prompt, kv = DeepPrompt(3, layers=2, heads=2, head_size=4), torch.randn(2, 2, 2, 4)
    before = prompt().detach().clone()
    prompt.add_to_slots(kv)
    torch.testing.assert_close(prompt() - before, kv[:, :, None, :, None].expand(2, 2, 1, 2, 3, 4))


def test_a_run_starts_from_the_data_in_the_same_way_twice(tmp_path):
    outputs = []
    for name in ("one", "two"):
        _, output = run_small(tmp_path, name, prompt={"length": 4, "init": "data"})
        assert "the prompt starts at the mean key and value of the last token of 30 training sentences" in " ".join(
            output.split()
        )
        outputs.append((tmp_path / name / "adapter/adapter.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    run_small(tmp_path, "random", prompt={"length": 4})
    assert (tmp_path / "random/adapter/adapter.safetensors").read_bytes() != outputs[0]


def test_an_untrained_prompt_starts_from_the_data_too(tmp_path):
    prompts = {}
    for init in ("random", "data"):
        run_small(tmp_path, init, prompt={"length": 4, "init": init}, trainer={"max_steps": 0})
        prompts[init] = load_adapter(tmp_path / init).prompt.embedding.weight
    moved = prompts["data"] - prompts["random"]
    assert moved.abs().max() > 0.1
    torch.testing.assert_close(moved, moved[:1].expand_as(moved))  # the same mean in every slot
