"""Trains the decoder of train_decoder.py in several processes with tf.distribute.

    python examples/train_tf_distribute.py --worker 0 --workers localhost:2001,localhost:2002
    python examples/train_tf_distribute.py --worker 1 --workers localhost:2001,localhost:2002
    python examples/train_tf_distribute.py              # one process, the same result

Every process has the whole model and its part of each batch; the optimizer adds
up the gradients. The loop is written out: Keras 3.15's model.fit fails under
MultiWorkerMirroredStrategy. Keras clips gradients before it adds them up, each
process its own, so there is no clipping here.
"""

import argparse
import json
import os

os.environ["KERAS_BACKEND"] = "tensorflow"
# With oneDNN's kernels TensorFlow 2.21 tears its heap in the first step of one start in seven on a
# CPU (14 of 96; 0 of 33 without).
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np
import tensorflow as tf
from text import load_text, sample_windows, split_text
from train_decoder import ByteDecoder, to_batches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file; default: Python's own help topics")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=256, help="bytes per training sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", help="HOST:PORT of all processes, with commas between")
    parser.add_argument("--worker", type=int, default=0, help="which of them this one is")
    parser.add_argument("--output", help="where to save the weights: FILE.weights.h5")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.workers:
        cluster = {"worker": args.workers.split(",")}
        task = {"type": "worker", "index": args.worker}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
        strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything is computed
    else:
        strategy = tf.distribute.get_strategy()

    keras.utils.set_random_seed(args.seed)  # the same weights everywhere
    text = split_text(load_text(args.text), args.length + 1)["train"]
    windows = sample_windows(
        [stretch.encode() for stretch in text], args.steps * args.batch_size, args.length + 1, 1
    )
    data = tf.data.Dataset.from_tensor_slices(to_batches(windows))
    data = data.batch(args.batch_size, drop_remainder=True)
    if args.workers:
        data = strategy.experimental_distribute_dataset(data)  # each process gets its part

    with strategy.scope():
        model = ByteDecoder()
        model(np.zeros((1, args.length), "int32"))  # built here, so mirrored
        optimizer = keras.optimizers.AdamW(args.learning_rate, epsilon=1e-6)
        optimizer.build(model.trainable_variables)

    def step_of_one(inputs, targets):
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
            loss = tf.reduce_mean(losses) / strategy.num_replicas_in_sync  # these are added up
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        optimizer.apply(gradients, variables)
        return loss

    @tf.function
    def train_step(batch):
        return strategy.reduce("SUM", strategy.run(step_of_one, args=batch), axis=None)

    for step, batch in enumerate(data):
        loss = train_step(batch)
        if args.worker == 0 and (step % 20 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {float(loss):.4f}", flush=True)
    if args.worker == 0 and args.output:
        model.save_weights(args.output)


if __name__ == "__main__":
    main()
