"""Errors of a net on images it is not trained on."""

import torch
import torch.nn.functional as F

from replication.data import centred


def autocast(device, precision):
    """The context in which a net runs: bfloat16 autocast, or float32 as it is."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def single_view(net, images, mean, device="cpu", precision="float32", batch=500):
    """Top-1 error in percent and mean cross-entropy of the single, unaltered view of every image (section 4.2).

    ``images``: pixels (N, H, W, 3) in uint8 and labels (N,). ``mean``: the training part's, (H, W, 3).
    The net's mode is put back afterwards.
    """
    training = net.training
    net.eval()
    mean = torch.as_tensor(mean, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode(), autocast(device, precision):
        for start in range(0, len(images.labels), batch):
            pixels = torch.from_numpy(images.pixels[start : start + batch]).to(device)
            labels = torch.from_numpy(images.labels[start : start + batch]).to(device)
            logits = net(centred(pixels, mean)).float()
            wrong += (logits.argmax(1) != labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
    net.train(training)
    return 100 * wrong.item() / len(images.labels), loss.item() / len(images.labels)
