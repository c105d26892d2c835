"""What an earlier packer left in a folder: finished shards that a killed one goes on after, or the whole data set."""

from __future__ import annotations

from hpcdistill.console import say, warn
from hpcdistill.data.fetch.location import is_whole
from hpcdistill.data.index import Index, Sample, load_index, role_of
from hpcdistill.data.pack.shard_files import FinishedShard, read_sidecars, remove, shard_name, sidecar_path
from hpcdistill.data.pack.sources import Source, source_digest
from hpcdistill.data.pack.split import SplitPacking, State, notes_of, title_of
from hpcdistill.errors import UserError, plural


def resume(job: SplitPacking, sources: list[Source], overwrite: bool) -> State:
    """Take over the finished shards that still fit, remove the others; UserError when they are not this data set's."""
    state, folder = State(), job.folder
    sidecars = read_sidecars(folder)
    foreign = sorted(path.name for path in folder.glob("*.tar") if path.name not in sidecars)
    theirs = {title_of(str(done.settings["recipe"]), str(done.settings["split"])) for done in sidecars.values() if done}
    theirs.discard(title_of(job.recipe.name, job.split))
    if (foreign or theirs) and not overwrite:
        holds = f"a tar file that was not packed here ({foreign[0]})" if foreign else f"half of {theirs.pop()}"
        raise UserError(f"{folder}: holds {holds}; choose another --out, or replace it with --overwrite")
    for finished in sidecars.values():
        if finished is None or not _fits(job, state, finished, sources):
            break
        state.add(finished)
    if state.shards:
        say(
            f"{folder}: going on after {plural(len(state.shards), 'finished shard')} with "
            f"{plural(len(state.samples), 'image')}"
        )
    kept = {shard.name for shard in state.shards}
    for path in folder.glob("shard-*.tar"):
        if path.name not in kept:
            remove([path, sidecar_path(folder, path.name)])
    return state


def _fits(job: SplitPacking, state: State, finished: FinishedShard, sources: list[Source]) -> bool:
    """True when the shard is whole and was made, with the same settings, of the sources that come next."""
    if finished.settings != job.settings() or finished.shard.name != shard_name(len(state.shards)):
        return False
    if finished.skipped and (job.on_error == "stop" or finished.max_pixels != job.max_pixels):
        return False
    # The image after the shard decided where it was cut.
    expected = [*finished.digests, *([finished.following] if finished.following else [])]
    first = len(state.digests)
    coming = sources[first : first + len(expected)] if finished.following else sources[first:]
    if [source.name for source in coming] != [name for name, _, _ in expected]:
        return False
    packed = [source for source in coming[: len(finished.digests)] if source.name not in finished.skipped]
    if len(packed) != len(finished.samples) or not all(map(_has_roles, finished.samples, packed)):
        return False
    return list(map(source_digest, coming)) == expected and is_whole(job.folder / finished.shard.name, finished.shard)


def _has_roles(sample: Sample, source: Source) -> bool:
    """True when the sample was made of a source of the same side: A and B may have been swapped since."""
    return set(source.roles) <= {role_of(suffix) for suffix in sample.members}


def whole_set(job: SplitPacking, sources: list[Source]) -> Index | None:
    """The index of `job.folder` when it holds just these sources, whole; None when a shard of it is damaged."""
    try:
        index = load_index(job.folder)
    except UserError as error:
        raise UserError(f"{error} with --overwrite") from None
    same = (index.recipe, index.split, index.kind) == (job.recipe.name, job.split, job.kind)
    if not same or index.notes != notes_of(job, sources, [source_digest(source) for source in sources]):
        what = "the same recipe with other images or another version" if same else title_of(index.recipe, index.split)
        if same and index.lr != job.lr:
            what = f"the same recipe with LR images of rule {index.lr}, not {job.lr}"
        raise UserError(
            f"{job.folder}: holds another data set, {what}; choose another --out, or replace it with --overwrite"
        )
    for shard in index.shards:
        if not is_whole(job.folder / shard.name, shard):
            warn(f"{job.folder / shard.name}: is damaged or missing; packing the data set again")
            return None
    return index
