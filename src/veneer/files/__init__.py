"""Adapters on disk: a directory <-> (configuration, tensors), and what of a file fits a model.

Everything here works on ``dict[str, Tensor]`` and directories; nothing knows modules.
"""
