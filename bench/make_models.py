"""Writes bench/data/*.json: names and shapes of real models' parameters, from the models' own definitions.

    python -m bench.make_models

Needs torchvision, timm and transformers (their definitions only: nothing is allocated, no weights are downloaded).
Models that none of them has are defined below. The benchmarks read the files alone: nobody else needs the packages.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

DATA = Path(__file__).parent / "data"


class WideBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation before each, and a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None


def wide_resnet(depth: int = 28, width: int = 10, classes: int = 10) -> nn.Module:
    """Zagoruyko and Komodakis 2016, arXiv 1605.07146, table 1."""
    widths = [16, 16 * width, 32 * width, 64 * width]
    model = nn.Sequential(nn.Conv2d(3, widths[0], 3, bias=False))
    for inputs, outputs in pairwise(widths):
        model.append(nn.Sequential(*[WideBlock(outputs if i else inputs, outputs) for i in range((depth - 4) // 6)]))
    return model.append(nn.BatchNorm2d(widths[-1])).append(nn.Linear(widths[-1], classes))


def import_torchvision() -> str:
    """Imports torchvision beside any torch: definitions run no compiled operator, but the import wants two to exist."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision.__version__.split("+")[0]


def definitions() -> dict[str, tuple[str, str, Callable[[], nn.Module]]]:
    """Name of the data file -> (title, source, constructor)."""
    torchvision_version = import_torchvision()
    import timm
    import torchvision
    import transformers

    vision = f"torchvision {torchvision_version}, torchvision.models"
    hub = f"transformers {transformers.__version__}"
    medium = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    llama = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return {
        "resnet18": ("ResNet-18", f"{vision}.resnet18()", torchvision.models.resnet18),
        "resnet50": ("ResNet-50", f"{vision}.resnet50()", torchvision.models.resnet50),
        "densenet121": ("DenseNet-121", f"{vision}.densenet121()", torchvision.models.densenet121),
        "wideresnet28-10": ("WideResNet-28-10", "bench/make_models.py, wide_resnet(28, 10), 10 classes", wide_resnet),
        "mixer-b16": (
            "Mixer-B/16",
            f"timm {timm.__version__}, create_model('mixer_b16_224')",
            lambda: timm.create_model("mixer_b16_224"),
        ),
        "vit-b16": ("ViT-B/16", f"{vision}.vit_b_16()", torchvision.models.vit_b_16),
        "bert-base": (
            "BERT-base",
            f"{hub}, BertModel(BertConfig())",
            lambda: transformers.BertModel(transformers.BertConfig()),
        ),
        "gpt2": (
            "GPT-2 small",
            f"{hub}, GPT2LMHeadModel(GPT2Config())",
            lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        ),
        "gpt2-medium": (
            "GPT-2 medium",
            f"{hub}, GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))",
            lambda: transformers.GPT2LMHeadModel(medium),
        ),
        "llama-1b": (
            "Llama 1B",
            f"{hub}, LlamaForCausalLM with Llama 3.2 1B's sizes (width 2048, 16 layers, tied embeddings)",
            lambda: transformers.LlamaForCausalLM(llama),
        ),
    }


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, (title, source, construct) in definitions().items():
        with torch.device("meta"):
            model = construct()
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        parameters = [(key, list(p.shape)) for key, p in model.named_parameters()]
        total = sum(p.numel() for p in model.parameters())
        lines = ",\n".join(f"    {json.dumps(pair)}" for pair in parameters)
        head = {"title": title, "source": source, "total": total}
        text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "parameters": [\n{lines}\n  ]\n}}\n'
        (DATA / f"{name}.json").write_text(text)
        print(f"{name:16} {len(parameters):5} tensors {total:14,} parameters  {source}")


if __name__ == "__main__":
    main()
