"""Adapters on disk: a directory <-> (configuration, tensors), and which tensors of a file fit a model.

Everything here works on ``dict[str, Tensor]`` and directories; nothing knows modules.
"""
