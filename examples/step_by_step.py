"""Training by hand, after `st-m3se candidates` and `st-m3se score`: what `st-m3se distill` does in one command.

    python examples/step_by_step.py

Hardware: a laptop's CPU, or a GPU. Time: a few minutes for 900 queries on two cores. Expects the folder `my-data`
(texts and judgements, as BEIR has them) and the store `teacher-scores`, as the README's commands make them. Logs
Kendall's tau, nDCG and margin errors against the teacher on held-out queries, before, during and after; ends with the
model in `distilled/model`, where `st-m3se distill` has it.
"""

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from st_m3se import (
    DistillationCollator,
    DistillationEvaluator,
    ResampleCallback,
    SoftmaxCrossEntropyLoss,
    TeacherScores,
    build_distillation_dataset,
)

model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
scores = TeacherScores.open("teacher-scores")
queries = scores.query_ids().to_pylist()
dev = set(queries[::10])  # every tenth query is for evaluation alone
train = [query for query in queries if query not in dev]
train_dataset = build_distillation_dataset(scores.select(train), data="my-data", split="train", list_size=4)
dev_dataset = build_distillation_dataset(scores.select(dev), data="my-data", split="train", list_size=None)
args = SentenceTransformerTrainingArguments(
    output_dir="output",
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=1e-4,
    eval_strategy="steps",  # without it the evaluator never runs
    eval_steps=0.25,  # of all steps
    eval_on_start=True,
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=args,
    train_dataset=train_dataset,
    loss=SoftmaxCrossEntropyLoss(model, in_batch_negatives=True),
    data_collator=DistillationCollator(preprocess_fn=model.preprocess),
    callbacks=[ResampleCallback()],  # other lists every epoch
    evaluator=DistillationEvaluator(dev_dataset, scale=20.0, name="dev"),
)
trainer.train()
model.save_pretrained("distilled/model")
