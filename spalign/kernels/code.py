"""The kernels, in Triton. One program handles one row of features or of the classifier, all of its D entries.

Nothing adds up in an order that chance decides: equal arguments give equal bits. ``*_stride`` are in elements. Places
are products of 64 bits: Triton gives sizes and strides 32, too few for a million samples.
"""

# Names of one letter are a kernel's own: i a sample, c a class, d feature dimensions, r samples of a tile.
import triton
import triton.language as tl


@triton.jit
def move_means(
    mean_CD,
    weight_C,
    delta_ND,
    owner_N,
    rate_N,
    class_N,
    features,
    targets_N,
    row_stride,
    column_stride,
    num_samples,
    num_classes,
    dim,
    ignore_index,
    momentum,
    CUMULATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move class means by a batch with class indices. Programs: one per sample.

    The program of the first sample of a class moves its mean, by all samples of the class in their order, and writes
    what concerns them; the others only say that they own no class.
    """
    i = tl.program_id(0)
    c = tl.load(targets_N + i).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    label_N = tl.load(targets_N + n, mask=n < num_samples, other=0).to(tl.int64)
    first = tl.min(tl.where((label_N == c) & (n < num_samples), n, BLOCK_N), axis=0)
    known = (c >= 0) & (c < num_classes) & (c != ignore_index)
    owner = known & (first == i)
    tl.store(owner_N + i, owner.to(tl.int8))
    if known == 0:
        tl.store(rate_N + i, 0.0)
        tl.store(class_N + i, 0)
    if owner:
        d = tl.arange(0, BLOCK_D)
        before_D = tl.load(mean_CD + c * dim + d, mask=d < dim, other=0.0)
        moved_D = tl.zeros([BLOCK_D], dtype=tl.float32)
        count = 0.0
        for start in range(0, num_samples, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            mine_R = (tl.load(targets_N + r, mask=r < num_samples, other=0).to(tl.int64) == c) & (r < num_samples)
            if tl.max(mine_R.to(tl.int32), axis=0) > 0:
                place_RD = r[:, None].to(tl.int64) * row_stride + d[None, :].to(tl.int64) * column_stride
                mask_RD = mine_R[:, None] & (d < dim)[None, :]
                h_RD = tl.load(features + place_RD, mask=mask_RD, other=0.0).to(tl.float32)
                # As everywhere: finite where every entry is, unless it overflows. Not a number is below nothing.
                usable_R = mine_R & (tl.sum(h_RD * h_RD, axis=1) < float("inf"))
                moved_D += tl.sum(tl.where(usable_R[:, None] & mask_RD, h_RD - before_D[None, :], 0.0), axis=0)
                count += tl.sum(usable_R.to(tl.float32), axis=0)
                tl.store(rate_N + r, usable_R.to(tl.float32), mask=mine_R)
                tl.store(class_N + r, tl.where(usable_R, c, 0), mask=mine_R)
        old = tl.load(weight_C + c)
        new = old + count
        divisor = tl.maximum(new if CUMULATIVE else count, 1.0)
        rate = (1.0 if CUMULATIVE else tl.where(old > 0.0, momentum, 1.0)) / divisor
        after_D = before_D + rate * moved_D
        tl.debug_barrier()  # every thread has read mean and weight, and may read what another stored in the loop
        tl.store(mean_CD + c * dim + d, after_D, mask=d < dim)
        tl.store(delta_ND + i.to(tl.int64) * dim + d, after_D - before_D, mask=d < dim)
        tl.store(weight_C + c, new)
        for start in range(0, num_samples, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            mine_R = (tl.load(targets_N + r, mask=r < num_samples, other=0).to(tl.int64) == c) & (r < num_samples)
            usable_R = tl.load(rate_N + r, mask=mine_R, other=0.0)
            tl.store(rate_N + r, usable_R * rate, mask=mine_R)


@triton.jit
def soft_weights(
    weight_NC,
    features,
    targets,
    row_stride,
    column_stride,
    num_classes,
    dim,
    least,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the weight of each sample for each class: soft labels less their floor, rescaled. Programs: samples."""
    i = tl.program_id(0).to(tl.int64)
    c, d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    h_D = tl.load(features + i * row_stride + d.to(tl.int64) * column_stride, mask=d < dim, other=0.0).to(tl.float32)
    q_C = tl.load(targets + i * num_classes + c, mask=c < num_classes, other=0.0).to(tl.float32)
    total = tl.sum(q_C, axis=0)
    floor = tl.min(tl.where(c < num_classes, q_C, float("inf")), axis=0)
    excess_C = tl.where(c < num_classes, q_C - floor, 0.0)
    excess = tl.sum(excess_C, axis=0)
    usable = (total * total * tl.sum(h_D * h_D, axis=0) < float("inf")) & (total > 0.0) & (excess > 1e-6 * total)
    weight_C = tl.where(usable, excess_C * (total / tl.where(usable, excess, 1.0)), 0.0)
    # What a softmax leaves of a hopeless class is too little to divide by.
    weight_C = tl.where(weight_C < least, 0.0, weight_C)
    tl.store(weight_NC + i * num_classes + c, weight_C, mask=c < num_classes)


@triton.jit
def move_soft_means(
    mean_CD,
    weight_C,
    delta_CD,
    owner_C,
    weight_NC,
    features,
    row_stride,
    column_stride,
    num_samples,
    num_classes,
    dim,
    momentum,
    CUMULATIVE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move class means by weighted samples, and turn the weights into rates. Programs: one per class."""
    c = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    before_D = tl.load(mean_CD + c * dim + d, mask=d < dim, other=0.0)
    moved_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    count = 0.0
    for start in range(0, num_samples, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        q_R = tl.load(weight_NC + r.to(tl.int64) * num_classes + c, mask=r < num_samples, other=0.0)
        mask_RD = (q_R > 0.0)[:, None] & (d < dim)[None, :]
        place_RD = r[:, None].to(tl.int64) * row_stride + d[None, :].to(tl.int64) * column_stride
        h_RD = tl.load(features + place_RD, mask=mask_RD, other=0.0).to(tl.float32)
        moved_D += tl.sum(tl.where(mask_RD, q_R[:, None] * (h_RD - before_D[None, :]), 0.0), axis=0)
        count += tl.sum(q_R, axis=0)
    old = tl.load(weight_C + c)
    new = old + count
    divisor = tl.where(count > 0.0, new if CUMULATIVE else count, 1.0)
    rate = (1.0 if CUMULATIVE else tl.where(old > 0.0, momentum, 1.0)) / divisor
    rate = tl.where(count > 0.0, rate, 0.0)
    after_D = before_D + rate * moved_D
    tl.debug_barrier()  # every thread has read the mean, its weight and those of the samples
    tl.store(mean_CD + c * dim + d, after_D, mask=d < dim)
    tl.store(delta_CD + c * dim + d, after_D - before_D, mask=d < dim)
    tl.store(owner_C + c, (count > 0.0).to(tl.int8))
    tl.store(weight_C + c, new)
    for start in range(0, num_samples, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        place_R = weight_NC + r.to(tl.int64) * num_classes + c
        q_R = tl.load(place_R, mask=r < num_samples, other=0.0)
        tl.store(place_R, q_R * rate, mask=r < num_samples)


@triton.jit
def add_deltas(mean_sum_D, delta_ND, owner_N, num_samples, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add what the means have moved by, in rows of N or C of which some count, to their sum. Programs: blocks of D."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.load(mean_sum_D + d, mask=d < dim, other=0.0)
    for start in range(0, num_samples, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        owner_R = tl.load(owner_N + r, mask=r < num_samples, other=0) != 0
        mask_RD = owner_R[:, None] & (d < dim)[None, :]
        delta_RD = tl.load(delta_ND + r[:, None].to(tl.int64) * dim + d[None, :], mask=mask_RD, other=0.0)
        sum_D += tl.sum(delta_RD.to(tl.float64), axis=0)
    tl.store(mean_sum_D + d, sum_D, mask=d < dim)


@triton.jit
def geometry(
    center_D, alignable_C, weight_C, mean_sum_D, num_classes, dim, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the global mean, and which classes may be aligned: those seen, if there are two. Programs: blocks of D."""
    seen_B = tl.zeros([BLOCK_C], dtype=tl.int32)
    for start in range(0, num_classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        seen_B += (tl.load(weight_C + c, mask=c < num_classes, other=0.0) > 0.0).to(tl.int32)
    count = tl.sum(seen_B, axis=0)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.load(mean_sum_D + d, mask=d < dim, other=0.0)
    tl.store(center_D + d, (sum_D / tl.maximum(count, 1).to(tl.float64)).to(tl.float32), mask=d < dim)
    if tl.program_id(0) == 0:
        for start in range(0, num_classes, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            seen_C = tl.load(weight_C + c, mask=c < num_classes, other=0.0) > 0.0
            tl.store(alignable_C + c, (seen_C & (count > 1)).to(tl.int8), mask=c < num_classes)


@triton.jit
def align_rows(
    by_weight_CD,
    e_CD,
    e_sum_PD,
    share_C,
    loss_P,
    mean_sum_D,
    weight_CD,
    mean_CD,
    center_D,
    seen_C,
    count,
    row_stride,
    column_stride,
    num_classes,
    dim,
    programs,
    floor_squared,
    tiny,
    OF_STATE: tl.constexpr,
    WRITE_SUM: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    BY_MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the regularizer's gradients by the classifier's rows, and by the means as if mu_G were fixed (e).

    Programs: every P-th tile of rows each, with the sums of its terms and of its e. ``OF_STATE``: a single program
    that adds up the means afresh, writes their sum if asked to, and gets weights of classes for ``seen``.
    """
    p = tl.program_id(0)
    d, k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    if OF_STATE:
        sum_D = tl.zeros([BLOCK_D], dtype=tl.float64)
        seen_R = tl.zeros([BLOCK_R], dtype=tl.int32)
        for start in range(0, num_classes, BLOCK_R):
            r = start + k
            mask_RD = (r < num_classes)[:, None] & (d < dim)[None, :]
            mean_RD = tl.load(mean_CD + r[:, None].to(tl.int64) * dim + d[None, :], mask=mask_RD, other=0.0)
            sum_D += tl.sum(mean_RD.to(tl.float64), axis=0)
            seen_R += (tl.load(seen_C + r, mask=r < num_classes, other=0.0) > 0.0).to(tl.int32)
        num_seen = tl.sum(seen_R, axis=0)
        if WRITE_SUM:
            tl.store(mean_sum_D + d, sum_D, mask=d < dim)
        center = (sum_D / tl.maximum(num_seen, 1).to(tl.float64)).to(tl.float32)
    else:
        num_seen = tl.load(count)
        center = tl.load(center_D + d, mask=d < dim, other=0.0)
    least = floor_squared * tl.sum(center * center, axis=0) + tiny
    share = 1.0 / tl.maximum(num_seen, 1).to(tl.float32)
    e_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    loss_R = tl.zeros([BLOCK_R], dtype=tl.float32)
    for start in range(p * BLOCK_R, num_classes, programs * BLOCK_R):
        r = start + k
        row = r[:, None].to(tl.int64)
        mask_RD = (r < num_classes)[:, None] & (d < dim)[None, :]
        place_RD = row * row_stride + d[None, :].to(tl.int64) * column_stride
        w = tl.load(weight_CD + place_RD, mask=mask_RD, other=0.0).to(tl.float32)
        x = tl.load(mean_CD + row * dim + d[None, :], mask=mask_RD, other=0.0) - center[None, :]
        if OF_STATE:
            alignable = (tl.load(seen_C + r, mask=r < num_classes, other=0.0) > 0.0) & (num_seen > 1)
        else:
            alignable = tl.load(seen_C + r, mask=r < num_classes, other=0) != 0
        ww, xx, wx = tl.sum(w * w, axis=1), tl.sum(x * x, axis=1), tl.sum(w * x, axis=1)
        inv_w, inv_x = tl.rsqrt(ww), tl.rsqrt(xx)
        valid = alignable & (xx > least) & (ww > tiny) & (inv_w > 0.0) & (inv_x > 0.0)
        cos = tl.minimum(tl.maximum(wx * inv_w * inv_x, -1.0), 1.0)
        loss_R += tl.where(valid, 1.0 - cos, 0.0)
        across = (inv_w * inv_x * share)[:, None]
        if BY_WEIGHT:
            by_weight = tl.where(valid[:, None], (cos * inv_w * inv_w * share)[:, None] * w - across * x, 0.0)
            tl.store(by_weight_CD + row * dim + d[None, :], by_weight, mask=mask_RD)
        if BY_MEAN:
            e = tl.where(valid[:, None], (cos * inv_x * inv_x * share)[:, None] * x - across * w, 0.0)
            tl.store(e_CD + row * dim + d[None, :], e, mask=mask_RD)
            tl.store(share_C + r, tl.where(alignable, share, 0.0), mask=r < num_classes)
            e_sum += tl.sum(e, axis=0)
    tl.store(loss_P + p, tl.sum(loss_R, axis=0) * share)
    if BY_MEAN:
        tl.store(e_sum_PD + p.to(tl.int64) * dim + d, e_sum, mask=d < dim)


@triton.jit
def add_terms(
    loss,
    e_sum_D,
    loss_P,
    e_sum_PD,
    programs,
    dim,
    BY_MEAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up what the programs of :func:`align_rows` have. Programs: blocks of D."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    sum_B = tl.zeros([BLOCK_P], dtype=tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        sum_B += tl.load(loss_P + p, mask=p < programs, other=0.0)
        if BY_MEAN:
            mask_PD = (p < programs)[:, None] & (d < dim)[None, :]
            place_PD = p[:, None].to(tl.int64) * dim + d[None, :]
            sum_D += tl.sum(tl.load(e_sum_PD + place_PD, mask=mask_PD, other=0.0), axis=0)
    if tl.program_id(0) == 0:
        tl.store(loss, tl.sum(sum_B, axis=0))
    if BY_MEAN:
        tl.store(e_sum_D + d, sum_D, mask=d < dim)


@triton.jit
def pull_back(
    by_features_ND,
    by_weight_CD,
    known_CD,
    e_CD,
    e_sum_D,
    share_C,
    rate_N,
    class_N,
    factor,
    num_samples,
    dim,
    BY_FEATURES: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write ``r_i (e - q sum e)`` of each sample's class, q the share of its mean in mu_G, and what is known by the
    classifier, both times a factor. Programs: one per sample, then one per row of the classifier.
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    times = tl.load(factor)
    if i < num_samples:
        if BY_FEATURES:
            c, rate = tl.load(class_N + i).to(tl.int64), tl.load(rate_N + i)
            e = tl.load(e_CD + c * dim + d, mask=d < dim, other=0.0)
            e -= tl.load(share_C + c) * tl.load(e_sum_D + d, mask=d < dim, other=0.0)
            # A half-precision loss scale must meet the gradient before the cast, or small values are lost.
            by_features = (rate * e * times).to(by_features_ND.dtype.element_ty)
            tl.store(by_features_ND + i * dim + d, by_features, mask=d < dim)
    elif BY_WEIGHT:
        place_D = (i - num_samples) * dim + d
        by_weight = tl.load(known_CD + place_D, mask=d < dim, other=0.0) * times
        tl.store(by_weight_CD + place_D, by_weight.to(by_weight_CD.dtype.element_ty), mask=d < dim)


@triton.jit
def project(
    out_CD,
    grad_CD,
    weight_CD,
    mean_CD,
    center_D,
    seen_C,
    out_row_stride,
    out_column_stride,
    grad_row_stride,
    grad_column_stride,
    row_stride,
    column_stride,
    num_classes,
    dim,
    gamma,
    floor_squared,
    tiny,
    OF_STATE: tl.constexpr,
    PAPER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the projected gradient; ``out`` may be the gradient itself. Programs: one per row.

    ``OF_STATE``: ``center`` is the sum of the means, and ``seen`` the weights of the classes, which fit one block.
    """
    c = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    center = tl.load(center_D + d, mask=d < dim, other=0.0)
    if OF_STATE:
        r = tl.arange(0, BLOCK_C)
        num_seen = tl.sum((tl.load(seen_C + r, mask=r < num_classes, other=0.0) > 0.0).to(tl.int32), axis=0)
        center = (center / tl.maximum(num_seen, 1).to(tl.float64)).to(tl.float32)
        alignable = (tl.load(seen_C + c) > 0.0) & (num_seen > 1)
    else:
        alignable = tl.load(seen_C + c) != 0
    least = floor_squared * tl.sum(center * center, axis=0) + tiny
    j = d.to(tl.int64)
    g = tl.load(grad_CD + c * grad_row_stride + j * grad_column_stride, mask=d < dim, other=0.0).to(tl.float32)
    w = tl.load(weight_CD + c * row_stride + j * column_stride, mask=d < dim, other=0.0).to(tl.float32)
    x = tl.load(mean_CD + c * dim + d, mask=d < dim, other=0.0) - center
    ww, wx = tl.sum(w * w, axis=0), tl.sum(w * x, axis=0)
    inv_w = tl.rsqrt(ww)
    has_row = (ww > tiny) & (inv_w > 0.0)
    k = tl.where(has_row, wx * inv_w * inv_w, 0.0)
    across = x - k * w
    aa = tl.sum(across * across, axis=0)
    xx = aa + k * wx
    inv_x = tl.rsqrt(xx)
    valid = alignable & has_row & (xx > least) & (inv_x > 0.0)
    along = tl.sum(g * across, axis=0) / aa
    # A gradient that is not a number is not made one.
    along = tl.where(along < 0.0, 0.0, along)
    along = tl.where(aa * inv_x * inv_x > floor_squared, along, 0.0)
    by_w = -along * k
    if PAPER:
        by_w += tl.sum(g * w, axis=0) * inv_w * inv_w
    projected = g + (gamma - 1.0) * along * x + (gamma - 1.0) * by_w * w
    result = tl.where(valid, projected, g).to(out_CD.dtype.element_ty)
    tl.store(out_CD + c * out_row_stride + j * out_column_stride, result, mask=d < dim)
