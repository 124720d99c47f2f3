"""esm-cpp's side of the benchmark. The Python of its environment runs this file; it has numpy and the standard library.

The first message is the path of the weights. Each request is a method's name and its arguments; each answer an error in words
(empty: none) and a value. Messages hold bytes and numbers alone, since the two Pythons have different numpys.
"""

import sys
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """The loaded model, and the sequences that it embeds next."""

    def load(self, weights: str) -> None:
        """Load a safetensors file with Hugging Face's names."""
        import esm_cpp

        self.model = esm_cpp.Model.load_from_safetensors(weights)

    def take(self, tokens: list[bytes]) -> None:
        """Take the tokens of sequences: int32 [L + 2] of each, with BOS and EOS."""
        import numpy as np

        self.tokens = [np.frombuffer(each, np.int32) for each in tokens]

    def embed(self) -> None:
        """esm-cpp's packed scheduler, which computes logits and keeps no hidden states."""
        self.model.forward_scheduled(self.tokens)

    def rows(self) -> list[bytes]:
        """The last layer of each sequence, one at a time: float32 [L, D] of each."""
        return [self.model.forward_with_hidden_states(each)[1][-1][1:-1].tobytes() for each in self.tokens]


def serve(connection: "Connection[Any, Any]") -> None:
    """Answer requests until the other side closes the connection."""
    worker = Worker()
    while True:
        try:
            name, *given = connection.recv()
        except EOFError:
            return
        try:
            answer = "", getattr(worker, name)(*given)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}", None
        connection.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
