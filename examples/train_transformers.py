"""Sharpness-aware training with the Transformers Trainer: a small BERT, from scratch, on Python's language reference.

    python examples/train_transformers.py
    torchrun --standalone --nproc-per-node 2 examples/train_transformers.py

SAMTrainer is the recipe to copy. TrainingArguments keep their meaning: gradient accumulation, clipping, schedule, mixed
precision, gradient checkpointing, checkpoints and resuming, DistributedDataParallel.
"""

import argparse
import gc
import os
import tempfile
from contextlib import nullcontext
from pydoc_data.topics import topics

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers  # pip install transformers
from transformers import (  # pip install transformers
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from fastsam import FusedSAM, frozen_running_stats


class SAMTrainer(Trainer):
    """The Trainer with FusedSAM around its optimizer; rho, interval and the like are FusedSAM's.

    When a checkpoint is resumed, its rho and adaptive win. Not for DeepSpeed, nor for optim="schedule_free_...",
    "lomo", "adalomo" or "..._layerwise".
    """

    def __init__(self, *args, rho=0.05, interval=1, adaptive=False, start=0, direction="gradient", **kwargs):
        super().__init__(*args, **kwargs)
        self.sam_options = {"rho": rho, "interval": interval, "adaptive": adaptive}
        self.sam_options |= {"start": start, "direction": direction}

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if not isinstance(getattr(optimizer, "optimizer", optimizer), FusedSAM):  # train() may be called again
            self.optimizer = FusedSAM(optimizer, **self.sam_options)
        return self.optimizer

    def _inner_training_loop(self, *args, **kwargs):
        self.window = []  # the micro-batches of the coming step
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if isinstance(sam := getattr(self.optimizer, "optimizer", None), FusedSAM):
                sam.restore()  # after Ctrl-C, or without memory, in a second pass

    def training_step(self, model, inputs, num_items_in_batch=None):
        sam = self.optimizer.optimizer  # inside Accelerate's wrapper
        if sam.direction == "momentum":
            if not self.window:  # the first micro-batch: the step's only gradient is that at w + e_w
                sam.first_step()
                self.window.append(inputs)
            if self.accelerator.sync_gradients:
                self.window.clear()
            return super().training_step(model, inputs, num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        # And what it was divided by: the Trainer takes a window that the data cut short along into the next epoch.
        self.window.append((inputs, num_items_in_batch, self.current_gradient_accumulation_steps))
        if self.accelerator.sync_gradients:
            if sam.first_step(zero_grad=True):
                self.second_pass(model)
            self.window.clear()
        return loss  # at w; the Trainer clips and steps by the gradients at w + e_w

    def second_pass(self, model):
        with frozen_running_stats(model):
            for i, (inputs, num_items_in_batch, accumulated) in enumerate(self.window, start=1):
                self.current_gradient_accumulation_steps = accumulated
                with nullcontext() if i == len(self.window) else self.accelerator.no_sync(model):
                    super().training_step(model, inputs, num_items_in_batch)

    def _save_checkpoint(self, model, trial):
        if self.optimizer.optimizer.perturbed:  # enable_jit_checkpoint saves just before the step: do it after
            self.control.should_save = True
        else:
            super()._save_checkpoint(model, trial)


def tokenizer_for(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[MASK]"]
    # Every rank trains its own. WordPiece breaks ties at random: the ranks would not agree.
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


def main(folder: str, steps: int, interval: int) -> None:
    texts = list(topics.values())  # what help("while") and the like show
    tokenizer = tokenizer_for(texts, vocab_size=1000)
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    blocks = [{"input_ids": ids[i : i + 64]} for i in range(0, len(ids) - 64, 64)]
    torch.set_num_threads(1)  # in a model as small as this, threads would only wait for each other
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **small))
    # BERT's loss is the mean over a micro-batch, though its signature lets the Trainer think that it is scaled already.
    model.accepts_loss_kwargs = False
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        warmup_steps=5,
        weight_decay=0.01,
        max_grad_norm=1.0,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        eval_on_start=True,  # not evaluate() before train(): Accelerate would then leave DistributedDataParallel out
        disable_tqdm=True,
    )
    trainer = SAMTrainer(
        model,
        args,
        rho=0.05,
        interval=interval,
        train_dataset=blocks[100:],
        eval_dataset=blocks[:100],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    before, after = trainer.state.log_history[0]["eval_loss"], trainer.evaluate()["eval_loss"]
    w = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    replicas = trainer.accelerator.gather(w[None])
    trainer.accelerator.print(f"loss before: {before:.3f}")
    trainer.accelerator.print(f"loss after: {after:.3f}")
    trainer.accelerator.print(f"replicas equal to the bit: {all(torch.equal(w, replica) for replica in replicas)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--interval", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(folder, options.steps, options.interval)
    if torch.distributed.is_initialized():
        gc.collect()  # DistributedDataParallel, a cycle, lets go of the group
        torch.distributed.barrier()  # gloo's threads let go of their last tensors, before Python exits
        torch.distributed.destroy_process_group()
