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
    """A net as ``torch.compile`` makes it: it computes the same up to rounding, with fewer ways through the memory.

    A CPU gets what is used twice computed once and kept; by default batch norm's factors were computed for every pixel.
    """
    torch.compiler.reset()  # torch keeps a few variants only, and those of nets trained before are not needed
    on_cpu = next(net.parameters()).device.type == "cpu"
    return torch.compile(net, dynamic=False, options={"realize_reads_threshold": 1} if on_cpu else None)


def flatten_running_stats(net):
    """Make all running means and variances of a net views of one tensor, quick to keep and average; returns it."""
    layers = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    buffers = [(layer, name) for layer in layers for name in ("running_mean", "running_var")]
    together = torch.cat([getattr(layer, name) for layer, name in buffers])
    for (layer, name), part in zip(buffers, together.split([layer.num_features for layer, _ in buffers]), strict=True):
        setattr(layer, name, part)
    return together


class Step:
    """Moves the weights of a net by one batch: ``step(images, labels, rate)``.

    net: on ``device_of(ranks)``; it is put into training mode and the layout of channels last.
    recipe: a ``Recipe``; precision: "float32" or "bfloat16".
    ranks: the processes that share every batch, of which each is called with its part.

    ``totals`` sums loss and wrong predictions over the images seen, on the device: nothing is read back in a step, so
    none waits for the one before. On a GPU a process of its own captures the whole step, forward, backward and update,
    as a CUDA graph after a few iterations and replays it from then on.
    """

    def __init__(self, net, recipe, precision, ranks=Ranks()):  # noqa: B008 (a tuple)
        self.device = device_of(ranks)
        self.net = net.to(self.device, memory_format=torch.channels_last).train()
        self.recipe, self.precision, self.ranks = recipe, precision, ranks
        # One tensor where parts of a batch are averaged; where they are not, compiled nets are quicker with many.
        several = recipe.bn_batch not in (None, recipe.batch) or ranks.world_size > 1
        self.running = flatten_running_stats(self.net) if several else None
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss and errors since they were read
        self.forward = self.net
        self.on_gpu = self.device.startswith("cuda")
        self.capturing = self.on_gpu and ranks.world_size == 1
        # A captured step reads its rate and its batch from these places.
        self.rate = torch.tensor(recipe.lr, device=self.device) if self.on_gpu else None
        self.graph, self.inputs, self.eager_steps = None, None, 0

    def begin(self, size, compile=False):
        """Compile the net, or have several processes add up their gradients. ``size``: images' height and width.

        Called once what is to be loaded into the net is loaded. One backward pass is made for nothing: so compiling is
        done before training; and after its first, the sums of their gradients are ordered anew, which in an
        undisturbed run would come after the first iteration, in one that goes on after some other.
        Raises RuntimeError when the net cannot be compiled.
        """
        if self.ranks.world_size > 1:
            self.forward, images = self._in_group(), 2
        elif compile:
            self.forward, images = compiled(self.net), self.recipe.bn_batch or self.recipe.batch
        else:
            return
        before = [buffer.clone() for buffer in self.net.buffers()]
        nothing = torch.zeros(images, 3, *size, device=self.device).to(memory_format=torch.channels_last)
        try:
            with autocast(self.device, self.precision):
                outputs = self.forward(nothing)
            outputs.float().sum().backward()
        except RuntimeError as error:
            if self.ranks.world_size > 1:
                raise
            raise RuntimeError(
                f"the net could not be compiled; set TORCH_COMPILE_DISABLE=1 to train without: {error}"
            ) from error
        self.optimizer.zero_grad()
        for buffer, value in zip(self.net.buffers(), before, strict=True):
            buffer.copy_(value)

    def _in_group(self):
        return DistributedDataParallel(
            self.net,
            device_ids=[self.ranks.local_rank] if torch.cuda.is_available() else None,
            gradient_as_bucket_view=True,
        )

    def state_dict(self):
        """What a checkpoint keeps."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "totals": self.totals}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.totals.copy_(state["totals"])

    def pop_totals(self):
        """The sum of losses and the number of wrong predictions since the last call."""
        loss, wrong = self.totals.tolist()
        self.totals.zero_()
        return loss, wrong

    def __call__(self, images, labels, rate):
        """One iteration on images ``(N, 3, H, W)`` and labels ``(N,)`` of this process at a learning rate."""
        if not self.on_gpu:
            self._set_rate(rate)
            self._compute(images, labels)
            return
        self.rate.fill_(rate)
        self._set_rate(self.rate)
        if self.capturing and self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            self._beside(images, labels)
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

    def _beside(self, images, labels):
        """An iteration on a stream of its own, as torch asks for before it captures one."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute(images, labels)
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, images, labels):
        """Capture a step; nothing is computed yet, so that the net is left as it was if this fails."""
        inputs, graph, stream = (images.clone(), labels.clone()), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may allocate meanwhile: those that read photographs do.
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
            if len(parts) > 1:  # every part moves the running statistics from the same place, all by their mean
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
