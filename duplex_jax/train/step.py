"""One optimiser step as one compiled program, and the evaluation of one batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from duplex_jax import parallel
from duplex_jax.model import attention, lora
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.model.tree import Params, from_tree, to_tree, with_weights
from duplex_jax.train import products
from duplex_jax.train.config import Config
from duplex_jax.train.loss import Sums, cross_entropy, targets_and_weights, token_statistics, totals, zero_sums
from duplex_jax.train.schedule import learning_rate

State = dict[str, Any]
"""`step` int32, `params` (trained weights), `opt` (moments), `mean_loss` float32 (running; 0 before the first step)."""

BATCH_LOGICAL = (None, "batch", "length")
"""Micro-batches, rows, tokens."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that determines a run's compiled programs.

    Attributes:
        config: the run's settings.
        model: shape of the model, with the vocabulary as trained.
        mesh: the device mesh.
        spec: the mesh's specification.
        row_ids: tokens whose embedding rows LoRA trains.
        idle_id: the idle token.
    """

    config: Config
    model: ModelConfig
    mesh: Mesh
    spec: parallel.MeshSpec
    row_ids: tuple[int, ...] = ()
    idle_id: int = 0

    @property
    def is_lora(self) -> bool:
        """Whether most weights are frozen."""
        return self.config.lora.rank > 0

    @property
    def scale(self) -> float:
        """Scale of the low-rank updates."""
        return self.config.lora.alpha / max(1, self.config.lora.rank)

    @property
    def backend(self) -> str:
        """Attention backend; `auto` is the mesh's own if it supports the computation's dtype."""
        compute = self.config.compute
        if compute.attention != "auto":
            return compute.attention
        return "xla" if self.spec.attention == "cudnn" and compute.dtype == "float32" else self.spec.attention

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """A, B, T: micro-batches, rows per micro-batch, tokens per row."""
        data = self.config.data
        return (data.micro_batches, data.batch // data.micro_batches, data.length)

    @functools.cached_property
    def batch_sharding(self) -> Any:
        """Sharding of a step's rows."""
        return parallel.sharding(self.mesh, BATCH_LOGICAL)

    @functools.cached_property
    def module(self) -> MiniCPM:
        """The abstract model, updates included; its arrays take no memory."""
        c = self.config.lora

        def make() -> MiniCPM:
            model = MiniCPM(self.model, rngs=nnx.Rngs(0))
            if self.is_lora:
                lora.add(model, c.rank, c.alpha, c.targets, self.row_ids, jax.random.key(0))
            return products.use(model) if self.spec.platform == "cpu" else model

        return nnx.eval_shape(make, graph=False)

    @property
    def trained(self) -> Any:
        """A filter that selects the trained parameters."""
        return nnx.LoRAParam if self.is_lora else nnx.Param


_FROZEN = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


def abstract_tree(plan: Plan, kind: Any, dtype: Any) -> Any:
    """Shapes, dtypes and shardings of the module's parameters of a kind."""

    def placed(weight: nnx.Variable) -> jax.ShapeDtypeStruct:
        sharding = parallel.sharding(plan.mesh, weight.out_sharding)
        return jax.ShapeDtypeStruct(weight.shape, dtype, sharding=sharding)

    return to_tree(plan.module, placed, kind)


def optimiser(plan: Plan) -> optax.GradientTransformation:
    """Clipping, Adam's direction and weight decay; the learning rate is applied in `train_step`."""
    optim = plan.config.optim

    def decays(params: Any) -> Any:
        def one(path: Any, x: Any) -> bool:
            return "norm" not in jax.tree_util.keystr(path)

        return jax.tree.map_with_path(one, params)

    clip = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
    return optax.chain(
        *clip, optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, decays),
    )  # fmt: skip


def abstract_state(plan: Plan) -> State:
    """The abstract train state: every leaf with shape, dtype and sharding."""
    trained = abstract_tree(plan, plan.trained, jnp.float32)
    everywhere = parallel.replicated(plan.mesh)

    def placed(x: Any) -> Any:
        if isinstance(x, optax.ScaleByAdamState):  # moments are sharded like their weights
            return x._replace(count=placed(x.count), mu=trained, nu=trained)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    shapes = jax.eval_shape(optimiser(plan).init, trained)
    opt = jax.tree.map(placed, shapes, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
    return {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        "params": trained,
        "opt": opt,
        "mean_loss": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
    }


def shardings(abstract: Any) -> Any:
    """The shardings of an abstract tree."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def abstract_frozen(plan: Plan) -> Any:
    """The abstract weights that LoRA leaves frozen; an empty tree in full fine-tuning."""
    if not plan.is_lora:
        return {}
    return abstract_tree(plan, _FROZEN, jnp.dtype(plan.config.compute.frozen_dtype))


def abstract_batch(plan: Plan) -> dict[str, Any]:
    """The abstract rows of a step."""
    kinds = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "loss_weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct(plan.batch_shape, kind, sharding=plan.batch_sharding) for name, kind in kinds.items()
    }


def init_state(plan: Plan, start: MiniCPM | None) -> tuple[State, Params]:
    """The state at step 0 and the weights that LoRA leaves frozen, on the mesh.

    Args:
        plan: the run's plan.
        start: the initial model on the host; None draws random weights from the config's seed.

    Returns:
        State and frozen weights; each device receives only its own shards.
    """
    abstract = abstract_state(plan)
    key = jax.random.key(plan.config.seed)
    whole = abstract_tree(plan, _FROZEN, jnp.float32)
    with jax.set_mesh(plan.mesh):
        if start is None:
            fresh = jax.jit(lambda k: to_tree(MiniCPM(plan.model, rngs=nnx.Rngs(k))), out_shardings=shardings(whole))
            params = fresh(key)
        else:
            params = put(to_tree(start), whole)
        frozen: Params = {}
        if plan.is_lora:
            c = plan.config.lora

            def updates(params: Params, key: jax.Array) -> Params:
                model = lora.add(from_tree(plan.model, params), c.rank, c.alpha, c.targets, plan.row_ids, key)
                return to_tree(model, kind=nnx.LoRAParam)

            trained = jax.jit(updates, out_shardings=shardings(abstract["params"]))(params, key)
            dtype = jnp.dtype(plan.config.compute.frozen_dtype)
            frozen = params if dtype == jnp.float32 else jax.tree.map(lambda x: x.astype(dtype), params)
        else:
            trained = params
        opt = jax.jit(optimiser(plan).init, out_shardings=shardings(abstract["opt"]))(trained)
        zeros = jax.jit(
            lambda: (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)),
            out_shardings=(abstract["step"].sharding, abstract["mean_loss"].sharding),
        )()
    return {"step": zeros[0], "params": trained, "opt": opt, "mean_loss": zeros[1]}, frozen


def put(params: Any, abstract: Any) -> Any:
    """Moves host arrays to the mesh; each process provides the shards of its own devices."""

    def one(x: Any, like: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: np.asarray(host[index], dtype=like.dtype)
        )

    return jax.tree.map(one, params, abstract)


def model_of(plan: Plan, trained: Params, frozen: Params) -> MiniCPM:
    """The module with these weights, updates included."""
    model = with_weights(plan.module, trained, plan.trained)
    return with_weights(model, frozen, _FROZEN) if plan.is_lora else model


def _computed(params: Any, dtype: Any) -> Any:
    """Casts matrices to the computation's dtype before they are communicated; norms and row ids stay unchanged."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        keep = "norm" in jax.tree_util.keystr(path) or not jnp.issubdtype(x.dtype, jnp.floating)
        return x if keep else x.astype(dtype)

    return jax.tree.map_with_path(one, params)


def _hidden(plan: Plan, model: MiniCPM, batch: dict[str, jax.Array]) -> jax.Array:
    compute, shard = plan.config.compute, parallel.constrain

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q = shard(q, ("batch", "length", "heads", None))
        k, v = (shard(a, ("batch", "length", "kv_heads", None)) for a in (k, v))
        return attention.attend(q, k, v, batch["segment_ids"], plan.backend, parallel.partition)

    return model.hidden(
        batch["tokens"], batch["positions"], dtype=jnp.dtype(compute.dtype), attend=attend, remat=compute.remat,
        shard=shard,
    )  # fmt: skip


def gradients(plan: Plan, trained: Any, frozen: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, Any]:
    """Loss, total weight and gradient over all micro-batches `[A, B, T]` of a step.

    The loss is sum(weight * nll) / sum(weight) over the whole step, however it is split. Data-parallel replicas
    accumulate the gradients of their own rows; these are reduced once after the micro-batches, in the dtype of the
    computation, because the reduction crosses hosts or slices.
    """
    total = jnp.sum(jax.vmap(lambda b: targets_and_weights(b)[1])(batch))
    divisor = jnp.maximum(total, 1e-9)
    if plan.spec.slice * plan.spec.data == 1:
        loss, grads = _accumulated(plan, trained, frozen, batch, divisor)
        return loss, total, grads

    def of_one_copy(trained: Any, frozen: Any, batch: Any, divisor: jax.Array) -> tuple[jax.Array, Any]:
        loss, grads = _accumulated(plan, trained, frozen, batch, divisor)
        grads = _computed(grads, jnp.dtype(plan.config.compute.dtype))
        return jax.lax.psum((loss, grads), parallel.REPLICA_AXES)

    loss, grads = jax.shard_map(
        of_one_copy, in_specs=(P(), P(), P(None, parallel.REPLICA_AXES), P()), out_specs=P(),
        axis_names=set(parallel.REPLICA_AXES), check_vma=False,
    )(trained, frozen, batch, divisor)  # fmt: skip
    return loss, total, jax.tree.map(lambda g: g.astype(jnp.float32), grads)


def _accumulated(
    plan: Plan, trained: Any, frozen: Any, batch: dict[str, jax.Array], divisor: jax.Array
) -> tuple[jax.Array, Any]:
    """Loss and float32 gradients of one replica's rows `[A, B, T]`, both divided by `divisor`."""
    dtype = jnp.dtype(plan.config.compute.dtype)
    frozen = _computed(frozen, dtype)
    # The embedding is read from its master weights, so that its gradient is summed in float32.
    computed = _computed(trained, dtype) | {name: trained[name] for name in trained if name == "embed"}
    output = model_of(plan, trained, frozen).output
    head = parallel.constrain(output.table().astype(dtype), ("vocab", None))  # gathered once for the whole step
    row_ids = output.row_ids
    zero = zero_sums(
        plan.spec.fsdp,
        plan.spec.tensor,
        vocab=head.shape[0],
        width=head.shape[1],
        rows=len(row_ids) if plan.is_lora and row_ids else None,
        frozen=plan.is_lora,
    )

    def add(sums: Sums, micro: dict[str, jax.Array]) -> tuple[Sums, Any]:
        targets, weights = targets_and_weights(micro)
        hidden, back = jax.vjp(lambda trained: _hidden(plan, model_of(plan, trained, frozen), micro), computed)
        # Divided here rather than at the end, which would read and write every gradient once more.
        d_hidden, sums = cross_entropy(
            plan.model, head, row_ids, hidden, targets, weights / divisor, sums, plan.config.compute.loss_chunk
        )
        return sums, back(d_hidden)[0]

    if plan.batch_shape[0] == 1:
        sums, grads = add(zero, jax.tree.map(lambda x: x[0], batch))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    else:

        def body(carry: Any, micro: Any) -> tuple[Any, None]:
            sums, grads = add(carry[0], micro)
            return (sums, jax.tree.map(lambda a, g: a + g.astype(a.dtype), carry[1], grads)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
        (sums, grads), _ = jax.lax.scan(body, (zero, zeros), batch)
    loss, d_head, d_rows = totals(sums)
    table = "embed" if plan.model.tie_word_embeddings else "head"
    if d_head is not None:
        grads = grads | {table: grads[table] + d_head}
    if d_rows is not None:
        grads = grads | {"rows": grads["rows"] | {table: grads["rows"][table] + d_rows}}
    return loss, grads


def train_step(plan: Plan, state: State, frozen: Any, batch: dict[str, jax.Array]) -> tuple[State, dict[str, Any]]:
    """One update; the weights stay unchanged at a loss spike, or a loss or gradient that is not finite."""
    optim, trouble = plan.config.optim, plan.config.trouble
    loss, weight, grads = gradients(plan, state["params"], frozen, batch)
    norm = optax.global_norm(grads)
    rate = learning_rate(optim)(state["step"])
    mean = state["mean_loss"]
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    spike = (mean > 0) & (loss > trouble.spike * mean) if trouble.spike else jnp.zeros((), bool)
    good = finite & ~spike

    def update(operands: Any) -> Any:
        params, opt, grads = operands
        direction, opt = optimiser(plan).update(grads, opt, params)
        return jax.tree.map(lambda p, d: p - rate * d, params, direction), opt

    params, opt = jax.lax.cond(good, update, lambda o: (o[0], o[1]), (state["params"], state["opt"], grads))
    smooth = jnp.where(mean > 0, 0.95 * mean + 0.05 * loss, loss)
    state = {
        "step": state["step"] + 1, "params": params, "opt": opt, "mean_loss": jnp.where(good, smooth, mean),
    }  # fmt: skip
    tokens = jnp.sum(batch["segment_ids"] > 0)
    return state, {
        "loss": loss, "grad_norm": norm, "lr": rate, "loss_weight": weight, "tokens": tokens,
        "finite": finite, "spike": spike,
    }  # fmt: skip


def jitted_step(plan: Plan) -> Any:
    """`train_step` compiled for the plan's mesh; the state is donated."""
    state = shardings(abstract_state(plan))
    return jax.jit(
        functools.partial(train_step, plan),
        in_shardings=(state, shardings(abstract_frozen(plan)), shardings(abstract_batch(plan))),
        out_shardings=(state, parallel.replicated(plan.mesh)),
        donate_argnums=0,
    )


def eval_step(plan: Plan, num_categories: int, trained: Any, frozen: Any, batch: dict[str, jax.Array]) -> Any:
    """Sums over one batch `[B, T]` by category: losses, weights, and idle decisions under teacher forcing.

    Returns:
        float32 `[C]` each: `loss` (sum of weight * nll), `weight`, `decisions`, and the number of decisions that are
        idle in the data (`idle_wanted`), in the model's prediction (`idle_said`), and in both (`idle_right`).
    """
    dtype = jnp.dtype(plan.config.compute.dtype)
    model = model_of(plan, _computed(trained, dtype), _computed(frozen, dtype))
    targets, weights = targets_and_weights(batch)
    nll, best = token_statistics(model, _hidden(plan, model, batch), targets)
    decision = jnp.pad(batch["decisions"][:, 1:], ((0, 0), (0, 1)))
    said, wanted = decision & (best == plan.idle_id), decision & (targets == plan.idle_id)
    member = batch["categories"][..., None] == jnp.arange(num_categories)

    def per_category(x: jax.Array) -> jax.Array:
        return jnp.sum(member * x[..., None].astype(jnp.float32), axis=(0, 1))

    return {
        "loss": per_category(nll * weights), "weight": per_category(weights),
        "idle_right": per_category(said & wanted), "idle_said": per_category(said),
        "idle_wanted": per_category(wanted), "decisions": per_category(decision),
    }  # fmt: skip


def jitted_eval(plan: Plan, num_categories: int) -> Any:
    """`eval_step` compiled for the plan's mesh; its results are replicated."""
    rows = parallel.sharding(plan.mesh, BATCH_LOGICAL[1:])
    names = ("tokens", "segment_ids", "positions", "loss_weights", "decisions", "categories")
    return jax.jit(
        functools.partial(eval_step, plan, num_categories),
        in_shardings=(
            shardings(abstract_state(plan)["params"]), shardings(abstract_frozen(plan)), dict.fromkeys(names, rows),
        ),
        out_shardings=parallel.replicated(plan.mesh),
    )  # fmt: skip
