"""Writes a network as the published code would: its names, repeated groups and optimizer numbering."""

import torch

_DENSE = {"input.linear.": "network_x.fc.", "input.norm.": "network_x.bn.", "feedback.": "network_s.fc.weight_", "readout.": "classifier."}
_CONV = {**_DENSE, "input.linear.": "network_x.conv.", "feedback.": "network_s.conv.weight_"}
_MULTI = {**_CONV, "feedback.": "network_s5.convT.weight_",
          **{f"hidden.{i}.linear.": f"network_s{i + 1}.conv." for i in range(4)},
          **{f"hidden.{i}.norm.": f"network_s{i + 1}.bn." for i in range(4)}}
_ORDER = ["weight", "bias", "weight_g", "weight_w"]


def published_name(network, name):
    table = _MULTI if len(network.hidden) else _CONV if network.input.linear.weight.dim() == 4 else _DENSE
    ours, theirs = next((ours, theirs) for ours, theirs in table.items() if name.startswith(ours))
    return theirs + name[len(ours):]


def published_file(network, optimizer_states, path, prefix="module.", epoch=3):
    """Save `network` with `optimizer_states` (by our parameter name) in the published format."""
    tensors = {published_name(network, name): tensor for name, tensor in network.state_dict().items()}
    repeated = {group + name: tensor for group in ("snn_func.", "snn_func_copy.") for name, tensor in tensors.items()
                if not name.startswith("classifier")}
    state_dict = {prefix + name: tensor for name, tensor in (tensors | repeated).items()}
    ours = {published_name(network, name): name for name, _ in network.named_parameters()}
    connections = sorted((name for name in ours if not name.startswith("classifier")), key=_registration)
    frozen = len(connections)
    keys = {name: key for key, name in enumerate(connections)}
    keys |= {"classifier.weight": len(connections) + frozen, "classifier.bias": len(connections) + frozen + 1}
    states = {keys[name]: optimizer_states[ours[name]] for name in ours}
    optimizer = {"state": states, "param_groups": [{"lr": 0.05, "params": list(range(len(connections) + frozen + 2))}]}
    torch.save({"epoch": epoch, "state_dict": state_dict, "acc": 50.0, "best_acc": 60.0, "optimizer": optimizer}, path)


def _registration(name):
    """network_x before network_s, s1 … s5; linear map before batch norm; within each as in _ORDER."""
    module, part, tensor = name.split(".")
    return module != "network_x", module, part == "bn", _ORDER.index(tensor)
