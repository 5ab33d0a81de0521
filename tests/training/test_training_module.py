"""The LightningModule: trained tensors, training steps, and the content of checkpoints."""

import pytest
import pytorch_lightning as pl
import torch
from support.encoders import save_small_encoder, small_backbone, small_tokenizer

from promcse_pl.config import DataConfig, LossConfig, OptimConfig
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.mlm import MlmHead
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import NonFiniteError

LR = 0.01


@pytest.fixture
def data(tmp_path) -> PromcseDataModule:
    rows = [f"w{5 + row} w7,w{6 + row} w8,w{40 + row}" for row in range(12)]
    (tmp_path / "rows.csv").write_text("a,b,c\n" + "\n".join(rows) + "\n")
    config = DataConfig(
        kind="triplets", train=str(tmp_path / "rows.csv"), batch_size=4, cache_dir=str(tmp_path / "cache")
    )
    return PromcseDataModule(config, small_tokenizer(), longest_input=32, seed=0, mlm=True)


def module_of(backbone: FrozenBackbone, *, clip_norm: float = 1.0, mlm: bool = False, steps: int = 3) -> PromcseModule:
    torch.manual_seed(5)
    encoder = PromptEncoder(backbone, length=4, head="mlp")
    head = MlmHead(backbone.word_embeddings, layer_norm_eps=backbone.layer_norm_eps) if mlm else None
    loss, optim = LossConfig(mlm_weight=0.1 if mlm else 0.0), OptimConfig(lr=LR, clip_norm=clip_norm)
    return PromcseModule(encoder, loss=loss, optim=optim, total_steps=steps, chunk_tokens=16, mlm_head=head)


def fit(module: PromcseModule, data: PromcseDataModule, *callbacks: pl.Callback) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=module.total_steps,
        gradient_clip_val=module.optim.clip_norm,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return trainer


class Watch(pl.Callback):
    """Keeps the gradients as the optimiser gets them, the logged norm, and the tensors before and after step 1."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.logged: list[float] = []

    def on_train_start(self, trainer, pl_module):
        self.before = {name: tensor.clone() for name, tensor in pl_module.encoder.state_dict().items()}
        optimizer = trainer.optimizers[0]
        trained = optimizer.param_groups[0]["params"]
        optimizer.register_step_post_hook(
            lambda *_: self.norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
            )
        )

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.logged.append(float(pl_module.entry["train/gradient_norm"]))
        if trainer.global_step == 1:
            self.after = {name: tensor.clone() for name, tensor in pl_module.encoder.state_dict().items()}


@pytest.mark.parametrize("mlm", [False, True])
def test_training_leaves_every_bit_of_the_frozen_encoder_and_moves_every_trained_tensor(data, mlm):
    module = module_of(small_backbone(), mlm=mlm)
    frozen = {name: tensor.clone() for name, tensor in module.encoder.backbone.state_dict().items()}
    trained = {name: tensor.clone() for name, tensor in module.named_parameters() if tensor.requires_grad}
    fit(module, data)
    after = module.encoder.backbone.state_dict()
    assert set(after) == set(frozen)
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    moved = {
        name for name, tensor in module.named_parameters() if name in trained and not torch.equal(tensor, trained[name])
    }
    assert moved == set(trained)
    assert any(name.startswith("mlm_head.") for name in trained) == mlm


def test_a_checkpoint_holds_the_trained_tensors_and_nothing_of_the_frozen_encoder(data, tmp_path):
    module = module_of(small_backbone())
    trainer = fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = {name for name, tensor in module.named_parameters() if tensor.requires_grad}
    assert set(checkpoint["state_dict"]) == trained
    assert not any("backbone" in name for name in checkpoint["state_dict"])
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(trained)
    other = module_of(small_backbone())
    other.load_state_dict(checkpoint["state_dict"])
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("mlm", [False, True])
def test_the_optimiser_holds_the_trained_tensors_alone_without_weight_decay(mlm):
    module = module_of(small_backbone(), mlm=mlm)
    optimizer = module.configure_optimizers()["optimizer"]
    (group,) = optimizer.param_groups
    frozen = {id(parameter) for parameter in module.encoder.backbone.parameters()}
    parts = [module.encoder.prompt, module.encoder.head, *([module.mlm_head] if mlm else [])]
    assert {id(tensor) for tensor in group["params"]} == {id(tensor) for part in parts for tensor in part.parameters()}
    assert not {id(tensor) for tensor in group["params"]} & frozen
    assert (group["weight_decay"], group["betas"], group["eps"], group["lr"]) == (0.0, (0.9, 0.999), 1e-8, LR)


def test_the_rate_falls_in_a_line_from_the_first_step_to_zero_after_the_last():
    module = module_of(small_backbone(), steps=4)
    parts = module.configure_optimizers()
    schedule = parts["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        parts["optimizer"].step()
        schedule.step()
    assert rates == pytest.approx([LR, LR * 3 / 4, LR / 2, LR / 4, 0, 0])
    assert parts["lr_scheduler"]["interval"] == "step"


def test_the_default_optimiser_trains_to_the_bits_of_earlier_versions(data, monkeypatch):
    def earlier(module):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=module.optim.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / module.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    modules = []
    for configure in (PromcseModule.configure_optimizers, earlier):
        monkeypatch.setattr(PromcseModule, "configure_optimizers", configure)
        modules.append(module_of(small_backbone()))
        fit(modules[-1], data)
    now, before = (module.state_dict() for module in modules)
    assert now.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in now.items())


def test_the_gradient_is_clipped_to_the_joint_norm_and_logged_as_it_was_before(data):
    watch = Watch()
    fit(module_of(small_backbone(), clip_norm=1e-3), data, watch)
    assert watch.norms == pytest.approx([1e-3] * 3, rel=1e-3)
    assert min(watch.logged) > 1e-2


def test_the_first_step_moves_no_value_by_more_than_the_learning_rate(data):
    watch = Watch()
    fit(module_of(small_backbone()), data, watch)
    moves = {name: (watch.after[name] - watch.before[name]).abs().max() for name in watch.before}
    assert max(moves.values()) <= LR * (1 + 1e-4)
    assert min(moves.values()) > 0


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_step_and_rows(data):
    module = module_of(small_backbone())

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                with torch.no_grad():
                    pl_module.encoder.head.dense.bias[0] = float("nan")
                self.rows = batch.rows_B
                self.state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    broken = Break()
    with pytest.raises(NonFiniteError) as caught:
        fit(module, data, broken)
    message = str(caught.value)
    assert message.startswith("the loss of step 2 (batch 1 of epoch 0, training rows ")
    assert str(broken.rows.tolist()).rstrip("]") in message
    assert f"Try: optim.lr={LR / 3:.2g}" in message
    for name, tensor in module.state_dict().items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(broken.state[name])), name


def test_a_gradient_that_is_not_finite_stops_before_the_update(data):
    module = module_of(small_backbone())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.encoder.prompt.embedding.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="the gradient of step 1 is not finite"):
        fit(module, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_chunks_change_the_work_and_not_the_loss(data):
    data.setup()
    batch = next(iter(data.train_dataloader()))
    losses = []
    for chunk_tokens in (None, 1, 16, 10_000):
        module = module_of(small_backbone(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), mlm=True)
        module.chunk_tokens = chunk_tokens
        module.encoder.prompt.dropout = 0.0
        losses.append({name: float(part.detach()) for name, part in module.losses(batch).named().items()})
    assert set(losses[0]) == {"loss", "contrastive", "hinge", "mlm"}
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_the_dropout_of_an_encoder_read_from_disk_is_on_from_the_first_step(data, tmp_path):
    class Modes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            self.asleep = [name for name, part in pl_module.named_modules() if not part.training]

    modes = Modes()
    fit(module_of(FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder"))), steps=1), data, modes)
    assert modes.asleep == []


def test_a_saved_small_encoder_trains_as_the_one_in_memory(data, tmp_path):
    folder = save_small_encoder(tmp_path / "encoder")
    loaded, made = module_of(FrozenBackbone.load(str(folder))), module_of(small_backbone())
    for module in (loaded, made):
        pl.seed_everything(1, verbose=False)
        fit(module, data)
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in loaded.state_dict().items())
