"""Loading for the comparisons with peft, where peft itself would let a mistake pass."""

import warnings
from pathlib import Path


def fail(text):
    raise SystemExit(f"error: {text}")


def load_base(model_dir, dtype="float32", attention="eager"):
    """The model of a Hugging Face directory. Exits when a tensor is missing, unexpected or misshapen."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, loading = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation=attention, output_loading_info=True
    )
    problems = {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys}
    if problems:
        fail(f"{model_dir}: transformers reports {problems}")
    return model


def load_adapter(base, adapter_dir, trainable=False, expected_warning=""):
    """The base with the adapter of a PEFT directory on it. Exits on any warning that does not say what is expected, and
    on any tensor that is in the file but not in the model or the other way around (of tensors too many in the file,
    peft says nothing)."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(adapter_dir), is_trainable=trainable)
    # Python's own notices about deprecated calls inside peft are not about the adapter.
    about = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    if any(not expected_warning or expected_warning not in text for text in about):
        fail(f"{adapter_dir}: peft warns: {'; '.join(about)}")
    with safe_open(Path(adapter_dir) / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    # Of what peft would write itself, the base's own tables and its second and third copies of a bias are not needed.
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    expected = {name for name in expected if ".original_module." not in name and ".modules_to_save." not in name}
    if found != expected:
        missing, unexpected = sorted(expected - found), sorted(found - expected)
        fail(f"{adapter_dir}: missing tensors {missing}, unexpected tensors {unexpected}")
    return model


def largest_distance(tensor_a, tensor_b):
    """The largest distance of two tensors of the same shape; infinite when one is not finite or the shapes differ."""
    if tensor_a.shape != tensor_b.shape:
        return float("inf")
    distance = (tensor_a.double() - tensor_b.double()).abs().max().item()
    return distance if distance == distance else float("inf")
