"""Training data, under its public name; training and evaluation share `gracec.data`."""

from gracec.data.conversations import (
    BrokenSample,
    Sample,
    TrainData,
    epoch_order,
    open_train_data,
)

__all__ = ["BrokenSample", "Sample", "TrainData", "epoch_order", "open_train_data"]
