"""Trains the decoder of train_decoder.py in several processes with PyTorch's DDP.

    torchrun --nproc-per-node 2 examples/train_ddp.py --steps 300
    python examples/train_ddp.py                        # one process, the same result

Every process has the whole model and its part of each batch; DDP averages the
gradients. On GPUs Keras puts the model on the current device, so each process
takes its own.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from text import load_text, sample_windows, split_text
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from train_decoder import ByteDecoder, to_batches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file; default: Python's own help topics")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=256, help="bytes per training sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", help="where to save the weights: FILE.weights.h5")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if size > 1:  # torchrun's environment says where the others are
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if args.batch_size % size:
        raise SystemExit(f"--batch-size {args.batch_size} can't be split into {size} equal parts.")

    keras.utils.set_random_seed(args.seed)  # the same weights everywhere
    text = split_text(load_text(args.text), args.length + 1)["train"]
    windows = sample_windows(
        [stretch.encode() for stretch in text], args.steps * args.batch_size, args.length + 1, 1
    )
    inputs, targets = (torch.from_numpy(x) for x in to_batches(windows))

    model = ByteDecoder()
    device = model(inputs[:1]).device  # built: DDP wants to see all weights
    parallel = DistributedDataParallel(model) if size > 1 else model
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, args.learning_rate, eps=1e-6)
    for step in range(args.steps):
        start = step * args.batch_size
        part = slice(start + rank, start + args.batch_size, size)
        logits = parallel(inputs[part].to(device))
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[part].to(device).flatten().long()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if rank == 0 and (step % 20 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {loss.item():.4f} in this process of {size}", flush=True)
    if rank == 0 and args.output:
        model.save_weights(args.output)
    if size > 1:
        distributed.barrier()  # none ends while another still talks to it
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
