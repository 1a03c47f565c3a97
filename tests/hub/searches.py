"""Generation by the full forward pass alone: no state, no cache."""

import numpy as np

from .models import forward


def next_logits(call, token_ids, index):
    """Logits of the token at `index`, all tokens from there on masked."""
    rows, total = token_ids.shape
    seen = np.broadcast_to(np.arange(total) < index, token_ids.shape).astype("int32")
    logits = [
        # The batch size all tests use: a call is compiled once for each.
        call({"token_ids": token_ids[i : i + 3], "padding_mask": seen[i : i + 3]})
        for i in range(0, rows, 3)
    ]
    return np.concatenate(logits)[:, index - 1].astype("float64")


def greedy_search(model, prompt, call=None):
    """Every token the argmax of its logits, a row from behind its prompt.

    `call` is what `forward` made of the model, where it is at hand already.
    """
    call = call or forward(model)
    token_ids, given = prompt["token_ids"].copy(), prompt["padding_mask"].astype(bool)
    for index in range(given.sum(1).min(), token_ids.shape[1]):
        chosen = next_logits(call, token_ids, index).argmax(-1)
        token_ids[:, index] = np.where(given[:, index], token_ids[:, index], chosen)
    return token_ids


def beam_search(model, prompt, num_beams):
    """The sequence of the largest probability among beams, for prompts of one length."""
    call = forward(model)
    batch, total = prompt["token_ids"].shape
    (start,) = set(prompt["padding_mask"].sum(1))
    beams = np.repeat(prompt["token_ids"][:, None], num_beams, axis=1)  # (batch, beam, token)
    scores = np.full((batch, num_beams), -np.inf)
    scores[:, 0] = 0.0  # all beams begin alike
    for index in range(start, total):
        logits = next_logits(call, beams.reshape(-1, total), index)
        logits = logits.reshape(batch, num_beams, -1)
        peak = logits.max(-1, keepdims=True)
        log_probs = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
        candidates = (scores[..., None] + log_probs).reshape(batch, -1)
        best = np.argsort(-candidates, axis=1)[:, :num_beams]
        scores = np.take_along_axis(candidates, best, axis=1)
        parent, token = np.divmod(best, logits.shape[-1])
        beams = np.take_along_axis(beams, parent[..., None], axis=1)
        beams[..., index] = token
    return beams[np.arange(batch), scores.argmax(1)]


def contrastive_search(model, prompt, k, alpha):
    """The token of the top k whose probability, less what it adds to sameness, is largest."""
    call, call_backbone = forward(model), forward(model.backbone)
    token_ids, given = prompt["token_ids"].copy(), prompt["padding_mask"].astype(bool)
    for index in range(given.sum(1).min(), token_ids.shape[1]):
        logits = next_logits(call, token_ids, index)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        candidates = np.argsort(-logits, axis=-1)[:, :k]
        scores = []
        for choice in range(k):
            tried = token_ids.copy()
            tried[:, index] = candidates[:, choice]
            seen = np.broadcast_to(np.arange(token_ids.shape[1]) <= index, tried.shape)
            batch = {"token_ids": tried, "padding_mask": seen.astype("int32")}
            hidden = call_backbone(batch).astype("float64")
            hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
            sameness = np.einsum("bth,bh->bt", hidden[:, :index], hidden[:, index]).max(1)
            chance = np.take_along_axis(probabilities, candidates[:, [choice]], axis=1)[:, 0]
            scores.append((1 - alpha) * chance - alpha * sameness)
        best = np.argmax(scores, axis=0)
        chosen = candidates[np.arange(len(best)), best]
        token_ids[:, index] = np.where(given[:, index], token_ids[:, index], chosen)
    return token_ids
