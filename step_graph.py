"""A training step recorded as a CUDA graph: a GPU then waits for no Python.

At batch 16 a step of a 40-layer model is some 6,000 short kernels. Launching them one by one from Python takes longer
than running them on a fast GPU; a recorded step is launched at once.
"""

import torch


class GraphedStep:
    """Runs `step(inputs)`, which adds to the gradients of `parameters` and returns the loss, from a recording.

    There is one recording per shape of `inputs` (a dict of tensors on the GPU), made when the shape first occurs; they
    share one memory pool. Kernels, dropout's random numbers and results are those of the plain step. A step that cannot
    be recorded runs as it is, and that is said once.
    """

    def __init__(self, step, parameters):
        self.step = step
        self.parameters = list(parameters)
        self.gradients = None
        self.pool = torch.cuda.MemPool()
        self.recordings = {}
        self.usable = True

    def __call__(self, inputs):
        if not self.usable:
            return self.step(inputs)
        self._provide_gradients()
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        if shapes not in self.recordings:
            try:
                self.recordings[shapes] = self._record(inputs)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                print(f"This model's step cannot be recorded as a CUDA graph, it runs slower: {error}".splitlines()[0])
                self.usable = False
                return self.step(inputs)
        graph, static, loss = self.recordings[shapes]
        for name, value in inputs.items():
            static[name].copy_(value)
        graph.replay()
        return loss.clone()

    def _provide_gradients(self):
        """Give every parameter the gradient that the recordings add to, zeroed if the last step dropped it."""
        if self.gradients is None:
            self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        if all(parameter.grad is None for parameter in self.parameters):
            torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def _record(self, inputs):
        static = {name: value.clone() for name, value in inputs.items()}
        random_state = torch.cuda.get_rng_state()
        for parameter in self.parameters:  # the run that lets libraries choose their kernels must leave no trace
            parameter.grad = None
        with torch.cuda.use_mem_pool(self.pool):
            self.step(static)
        torch.cuda.set_rng_state(random_state)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool.id, capture_error_mode="thread_local"):
            loss = self.step(static)
        return graph, static, loss
