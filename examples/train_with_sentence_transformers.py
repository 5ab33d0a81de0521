"""Train a deep prompt on a frozen MiniLM with the trainer and a loss of sentence-transformers; under a minute on 2 cores."""

from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from promcse_pl import PromCSE
from promcse_pl.adapter import save_adapter
from promcse_pl.data.demo import demo_triplets
from promcse_pl.interop.sentence_transformers import as_sentence_transformer
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder

backbone = FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2")
model = as_sentence_transformer(PromCSE(PromptEncoder(backbone, length=10, pooling="avg")))

data = Dataset.from_list([{"anchor": a, "positive": p, "negative": n} for a, p, n in demo_triplets()[:160]])
arguments = SentenceTransformerTrainingArguments(
    "trainer", num_train_epochs=1, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=1
)
trainer = SentenceTransformerTrainer(model, arguments, data, loss=MultipleNegativesRankingLoss(model))
trainer.train()

save_adapter(model[0].encoder, Path("adapter"))  # for PromCSE.load("adapter") and the promcse commands
model.save_pretrained("model")  # for SentenceTransformer("model", trust_remote_code=True) and PromCSE.load
