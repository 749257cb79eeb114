"""Stands before PyTorch in the processes that tests start: tensorboardX imports it if it can, which takes seconds."""

raise ImportError("the processes that tests start have no PyTorch")
