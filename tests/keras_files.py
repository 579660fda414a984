"""Networks of Keras as tf2onnx writes them: ``python tests/keras_files.py NAME FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np


def mobile(keras: Any) -> Any:
    layers = keras.layers
    x = inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same")(layers.ZeroPadding2D(1)(x))
    x = layers.Activation("hard_silu")(layers.BatchNormalization()(x))
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(8, 1, activation="hard_sigmoid")(
        layers.Conv2D(4, 1, activation="relu")(gate)
    )
    y = layers.Conv2D(8, 3, padding="same", activation="swish")(layers.Multiply()([x, gate]))
    x = layers.Concatenate()([layers.Add()([x, y]), y])
    x = layers.MaxPool2D(3, strides=2, padding="same")(x)
    return keras.Model(inputs, layers.Dense(4)(layers.Flatten()(x)))


def tokens(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((10,), dtype="int32"),
            layers.Embedding(20, 8),
            layers.Conv1D(8, 3, padding="causal"),
            layers.Bidirectional(layers.LSTM(4)),
            layers.Dense(3),
        ]
    )


def groups(keras: Any) -> Any:
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 3))
    x = layers.GroupNormalization(3)(layers.Conv2D(6, 3, padding="same")(x))
    x = layers.GroupNormalization(-1)(layers.Conv2D(4, 3, activation="relu")(x))
    x = layers.GroupNormalization(2)(layers.Dense(6)(layers.Flatten()(x)))
    return keras.Model(inputs, layers.Dense(3)(x))


def rows(keras: Any) -> Any:
    layers = keras.layers
    x = inputs = keras.Input((6, 8))
    y = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.LayerNormalization(epsilon=1e-6)(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def write(make: Any, folder: Path) -> None:
    """``model.onnx``, and a sample with its result in ``data.npz``."""
    import keras
    import tensorflow as tf
    import tf2onnx

    net, rng = make(keras), np.random.default_rng(0)
    net.set_weights([np.abs(rng.normal(0.3, 0.3, w.shape)) for w in net.get_weights()])
    signature = [tf.TensorSpec([1, *v.shape[1:]], v.dtype) for v in net.inputs]
    call = tf.function(lambda x: net(x, training=False))
    proto, _ = tf2onnx.convert.from_function(call, input_signature=signature, opset=15)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    x = rng.standard_normal(signature[0].shape).astype(np.float32)
    if signature[0].dtype == tf.int32:
        x = np.arange(10, dtype=np.int32)[None]
    np.savez(folder / "data.npz", x=x, y=net(x, training=False).numpy())


if __name__ == "__main__":
    networks = {"groups": groups, "mobile": mobile, "rows": rows, "tokens": tokens}
    write(networks[sys.argv[1]], Path(sys.argv[2]))
