"""Draws timelines of schedules: one row per rank, one colour per role, branch and kind of action."""

from collections.abc import Mapping

from megatron_apt.schedule.build import Built

_HUES = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_STRENGTH = {"F": 1.0, "I": 0.7, "W": 0.4}


def draw(built: Mapping[str, Built], file: str) -> None:
    """Writes one panel for each schedule, on one scale of time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    longest = max(one.timeline.makespan for one in built.values())
    ranks = max(one.graph.window.ranks for one in built.values())
    figure, axes = pyplot.subplots(
        len(built), 1, figsize=(18, 0.8 + len(built) * (0.6 + 0.28 * ranks)), sharex=True, squeeze=False
    )
    hues: dict[tuple[str, str, str], str] = {}
    kinds: dict[tuple[str, str, str], set[str]] = {}
    for axis, (name, one) in zip(axes[:, 0], built.items(), strict=True):
        graph = one.graph
        bars: dict[tuple, list] = {}
        for task, what in enumerate(graph.tasks):
            if graph.time[task]:
                part = (what.phase, what.branch, what.role)
                hues.setdefault(part, _HUES[len(hues) % len(_HUES)])
                kinds.setdefault(part, set()).add(what.kind)
                bars.setdefault((graph.rank[task], part, what.kind), []).append(
                    (one.timeline.start[task], graph.time[task])
                )
        for (rank, part, kind), spans in bars.items():
            axis.broken_barh(
                spans,
                (rank - 0.45, 0.9),
                facecolor=(hues[part], _STRENGTH[kind]),
                edgecolor="white",
                linewidth=0.2,
            )
        axis.set(
            xlim=(0, longest),
            ylim=(graph.window.ranks - 0.5, -0.5),
            ylabel="rank",
            yticks=range(graph.window.ranks),
        )
        axis.set_title(
            f"{name}: bubble {one.timeline.bubble:.3f}, peak {max(one.timeline.peak_live):g} live "
            "activations",
            loc="left",
            fontsize=10,
        )
    axes[-1, 0].set_xlabel("time")
    legend = [  # one column for each role in a branch
        Patch(facecolor=(hue, strength), label=f"{kind} {'/'.join(part[:2])} {part[2]}")
        if kind in kinds[part]
        else Patch(alpha=0, label=" ")
        for part, hue in hues.items()
        for kind, strength in _STRENGTH.items()
    ]
    figure.legend(handles=legend, loc="lower center", ncols=len(hues), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight(), 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
