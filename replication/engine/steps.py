"""One step of training, made fast: the net compiled where that pays, on a GPU the whole step replayed as a graph."""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from replication.engine.distributed import Ranks
from replication.engine.machine import autocast

EAGER_STEPS = 3  # before a CUDA graph is captured: libraries set up what they need, and so does the optimizer
DEEPEST_COMPILED = 152  # layers: the time to compile grows with depth, to more than half an hour at 1202


def device_of(ranks=Ranks()):  # noqa: B008 (a tuple)
    """Where one of several processes trains: the CUDA device that is its own if there is one, else the CPU."""
    return f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else "cpu"


def compiled(net):
    """The net compiled by ``torch.compile``: the same up to rounding, with less memory traffic.

    On a CPU, values that are used twice are stored; by default batch norm's factors were recomputed for every pixel.
    """
    torch.compiler.reset()  # torch keeps few variants, and those of earlier nets are no longer needed
    on_cpu = next(net.parameters()).device.type == "cpu"
    return torch.compile(net, dynamic=False, options={"realize_reads_threshold": 1} if on_cpu else None)


def flatten_running_stats(net):
    """Make all running means and variances of a net views of one tensor, which is fast to copy and average."""
    layers = [module for module in net.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    layers = [layer for layer in layers if layer.running_mean is not None]
    if not layers:  # of a net of one's own
        return torch.zeros(0, device=next(net.parameters()).device)
    buffers = [(layer, name) for layer in layers for name in ("running_mean", "running_var")]
    together = torch.cat([getattr(layer, name) for layer, name in buffers])
    for (layer, name), part in zip(buffers, together.split([layer.num_features for layer, _ in buffers]), strict=True):
        setattr(layer, name, part)
    return together


class Step:
    """Moves the weights of a net by one batch: ``step(images, labels, rate)``.

    net: moved to ``device_of(ranks)``, into training mode and channels-last layout.
    recipe: a ``Recipe``; precision: "float32" or "bfloat16".
    ranks: the processes that share every batch; each is called with its part.

    ``totals`` sums loss and wrong predictions over the images, on the device: no step reads anything back, so none
    waits for the previous one. On a GPU a single process captures the whole step, forward, backward and update, as a
    CUDA graph after a few iterations and replays it from then on.
    """

    def __init__(self, net, recipe, precision, ranks=Ranks()):  # noqa: B008 (a tuple)
        self.device = device_of(ranks)
        self.net = net.to(self.device, memory_format=torch.channels_last).train()
        self.recipe, self.precision, self.ranks = recipe, precision, ranks
        # One tensor if the statistics of several parts are averaged; otherwise compiled nets are faster with many.
        several = recipe.bn_batch not in (None, recipe.batch) or ranks.world_size > 1
        self.running = flatten_running_stats(self.net) if several else None
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss and errors since the last read
        self.forward = self.net
        self.on_gpu = self.device.startswith("cuda")
        self.capturing = self.on_gpu and ranks.world_size == 1
        # A captured step reads its rate and its batch from these tensors.
        self.rate = torch.tensor(recipe.lr, device=self.device) if self.on_gpu else None
        self.graph, self.inputs, self.eager_steps = None, None, 0

    def begin(self, size, compile=False):
        """Compile the net, or have several processes add up their gradients; returns whether the net is compiled.

        size: the images' height and width. Where compiling fails, a line says so, and the net is trained as it is.
        Call after loading weights. It makes one backward pass whose result is discarded: compiling is then done before
        training starts, and so is DistributedDataParallel's reordering of its sums after the first backward pass,
        which would otherwise come at another iteration of a resumed run than of an undisturbed one.
        """
        if self.ranks.world_size > 1:
            self.forward = self._distributed()
            self._discard(2, size)
            return False
        if not compile:
            return False
        try:
            self.forward = compiled(self.net)
            self._discard(self.recipe.bn_batch or self.recipe.batch, size)
        except Exception as error:  # a compiler, a linker, a cache folder or torch itself may be broken in any way
            self.forward = self.net
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"the net could not be compiled, training goes on without: {reason}", flush=True)
            return False
        return True

    def _discard(self, images, size):
        """A forward and a backward pass of as many blank images, which leave the net as it was."""
        before = [buffer.clone() for buffer in self.net.buffers()]
        blank = torch.zeros(images, 3, *size, device=self.device).to(memory_format=torch.channels_last)
        try:
            with autocast(self.device, self.precision):
                outputs = self.forward(blank)
            outputs.float().sum().backward()
        finally:
            self.optimizer.zero_grad()
            for buffer, value in zip(self.net.buffers(), before, strict=True):
                buffer.copy_(value)

    def _distributed(self):
        return DistributedDataParallel(
            self.net,
            device_ids=[self.ranks.local_rank] if torch.cuda.is_available() else None,
            gradient_as_bucket_view=True,
        )

    def state_dict(self):
        """The part of a checkpoint that this step restores."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "totals": self.totals}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.totals.copy_(state["totals"])

    def pop_totals(self):
        """``totals`` since the last call: the sum of losses and the number of wrong predictions."""
        totals = self.totals.tolist()
        self.totals.zero_()
        return totals

    def __call__(self, images, labels, rate):
        """One iteration at a learning rate, on this process's images ``(N, 3, H, W)`` and labels ``(N,)``."""
        if not self.on_gpu:
            self._set_rate(rate)
            self._compute(images, labels)
            return
        self.rate.fill_(rate)
        self._set_rate(self.rate)
        if self.capturing and self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            self._on_own_stream(images, labels)
            return
        if self.capturing and self.graph is None:
            self._capture(images, labels)
        if self.graph is None:  # several processes, or it could not be captured
            self._compute(images, labels)
            return
        for place, part in zip(self.inputs, (images, labels), strict=True):
            place.copy_(part)
        self.graph.replay()

    def _set_rate(self, rate):
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate

    def _on_own_stream(self, images, labels):
        """An iteration on a separate stream, which torch requires before a capture."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute(images, labels)
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, images, labels):
        """Capture a step without computing it, so that a failure leaves the net as it was."""
        inputs, graph, stream = (images.clone(), labels.clone()), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads, such as those that read photographs, may allocate meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._compute(*inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            print(f"a step could not be captured as a CUDA graph, training goes on without: {error}")
            self.capturing = False
            return
        self.graph, self.inputs = graph, inputs

    def _compute(self, images, labels):
        self.optimizer.zero_grad()
        size = self.recipe.bn_batch or len(labels)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        sums = torch.zeros_like(self.totals)
        if len(parts) > 1:
            before, moved = self.running.clone(), torch.zeros_like(self.running)
        for images, labels in parts:
            last = labels is parts[-1][1]
            with contextlib.nullcontext() if last or self.ranks.world_size == 1 else self.forward.no_sync():
                with autocast(self.device, self.precision):
                    logits = self.forward(images)
                logits = logits.float()
                loss = F.cross_entropy(logits, labels)
                (loss / len(parts)).backward()
            wrong = (logits.detach().argmax(1) != labels).sum()
            sums += torch.stack([loss.detach() * len(labels), wrong])
            if len(parts) > 1:  # each part updates the same running statistics; their mean is the result
                moved += self.running
                self.running.copy_(before)
        if len(parts) > 1:
            self.running.copy_(moved / len(parts))
        if self.ranks.world_size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(self.running)
            self.running /= self.ranks.world_size
        self.optimizer.step()
        self.totals += sums


class DetectionStep(Step):
    """Moves the weights of a detector by one batch: ``step(images, targets, rate)``, as torchvision's nets take them.

    ``bn_batch`` images pass through it together; their batch norm is fixed. ``totals`` sums the losses over the images.
    """

    LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")

    def __init__(self, net, recipe, precision, ranks=Ranks()):  # noqa: B008 (a tuple)
        super().__init__(net, recipe, precision, ranks)
        self.totals = torch.zeros(len(self.LOSSES), dtype=torch.float64, device=self.device)

    def begin(self, size, compile=False):
        """Nothing to prepare: what a detector does depends on values, so it is not compiled."""
        return False

    def __call__(self, images, targets, rate):
        self._set_rate(rate)
        self.optimizer.zero_grad()
        part, sums = self.recipe.bn_batch or len(images), torch.zeros_like(self.totals)
        for start in range(0, len(images), part):
            with autocast(self.device, self.precision):
                losses = self.net(images[start : start + part], targets[start : start + part])
            losses = torch.stack([losses[name].float() for name in self.LOSSES])
            (losses.sum() * part / len(images)).backward()
            sums += losses.detach() * part
        if self.ranks.world_size > 1:
            dist.all_reduce(sums)
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.ranks.world_size
        self.optimizer.step()
        self.totals += sums
