"""Entry points of torch.hub for the nets of Table 6 and their plain counterparts, as ``load_net`` loads them.

torch.hub.load("<this repository>", "resnet_56", dataset="cifar10", seed=0); docs/nets.md lists those with weights.
"""

dependencies = ["torch", "numpy", "pandas", "PIL", "safetensors", "filelock", "tqdm"]


def net(name, dataset="digits", seed=0):
    """Any net with weights by its name, such as "resnet-20"; the error for another name lists those with weights."""
    from replication import load_net  # not before torch.hub has looked for the dependencies

    return load_net(name, dataset, seed)


def _entry(name):
    def load(dataset="digits", seed=0):
        return net(name, dataset, seed)

    load.__doc__ = f"{name} trained on a data set from a seed, for uint8 (N, H, W, 3) in RGB: see docs/nets.md."
    return load


plain_20 = _entry("plain-20")
plain_32 = _entry("plain-32")
plain_44 = _entry("plain-44")
plain_56 = _entry("plain-56")
resnet_20 = _entry("resnet-20")
resnet_32 = _entry("resnet-32")
resnet_44 = _entry("resnet-44")
resnet_56 = _entry("resnet-56")
resnet_110 = _entry("resnet-110")
resnet_1202 = _entry("resnet-1202")
