"""Tiny random vision-language models of real architectures, with processors built from their parts, saved to a folder.

The tokenizer's words are ABC words: what such a model says is random, and yet can be read as a description.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = [
    "the", "mole", "is", "asymmetrical", "symmetrical", "slightly", "highly", "moderately", "with", "irregular",
    "smooth", "ragged", "border", "borders", "and", "its", "color", "colors", "light-brown", "dark-brown", "black",
    "red", "white", "blue-gray", "lesion", "benign", "malignant", "description", "image",
]  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<|image|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_CHAT = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
MLLAMA_CHAT = "<s>" + _CHAT.replace("IMAGE", "<|image|>")
QWEN_CHAT = _CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")


def tokenizer() -> Any:
    """Whole words and single letters; what is neither is `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(32, 127)]
    vocabulary = dict.fromkeys([*SPECIAL, "<unk>", *WORDS, *letters])
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[3:],
    )


def save_mllama(folder: Path, seed: int = 0) -> Path:
    """A Mllama (Llama 3.2 Vision) of two text layers, one of them looking at the image."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    words = tokenizer()
    torch.manual_seed(seed)
    config = MllamaConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 28, "patch_size": 14, "max_num_tiles": 1, "vision_output_dim": 32,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
        },
        text_config={
            "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "cross_attention_layers": [1],
            "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=words.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip
    images = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=1)
    MllamaForConditionalGeneration(config).save_pretrained(folder)
    MllamaProcessor(image_processor=images, tokenizer=words, chat_template=MLLAMA_CHAT).save_pretrained(folder)
    return folder


def save_qwen(folder: Path, seed: int = 0) -> Path:
    """A Qwen2-VL of one layer, whose image tokens are as many as the image is large."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    words = tokenizer()
    torch.manual_seed(seed)
    ids = {name: words.convert_tokens_to_ids(token) for name, token in (
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
    )}  # fmt: skip
    config = Qwen2VLConfig(
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config={
            "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        **ids,
    )  # fmt: skip
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4}
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=sizes),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(size=sizes),
        chat_template=QWEN_CHAT,
    ).save_pretrained(folder)
    return folder
