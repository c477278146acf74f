"""Figures to look at: images; one run up to some iteration; errors of nets with blocks left out."""

import matplotlib.pyplot as plt

from replication.report.error_curves import STYLE, colour
from replication.report.tables import spelled


@plt.rc_context(STYLE)
def run_until(record, percent=100):
    """One run up to a percentage of its iterations: its errors, and of its 3x3 layers responses and gradient norms.

    Layers are those of the last measurement before that. The axes are those of the whole run, so that figures of one
    run at several percentages can be compared.
    """
    iteration = record.run.settings.iterations * percent / 100
    history, layers = record.history, record.layers[record.layers["kind"] == "3x3 conv"]
    measured = layers["iteration"][layers["iteration"] <= iteration].max()
    now = layers[layers["iteration"] == measured]
    shade = colour(record.net)
    figure, (errors, responses, gradients) = plt.subplots(1, 3, figsize=(16, 4.2))
    reached = history[history["iteration"] <= iteration]
    for column, style, width in (("train_error", "--", 1.3), ("test_error", "-", 2.6)):
        shown = reached[["iteration", column]].dropna()
        label = "training error" if column == "train_error" else "test error"
        errors.plot(shown["iteration"], shown[column], style, color=shade, linewidth=width, label=label)
    errors.set(title="errors", xlabel="iterations", ylabel="error (%)", xlim=(0, record.run.settings.iterations))
    errors.set_ylim(0, min(100, 1.05 * history[["train_error", "test_error"]].max().max()))
    errors.legend()
    for axes, column, title in (
        (responses, "response_std", "responses"),
        (gradients, "gradient_norm", "gradients"),
    ):
        axes.plot(range(1, len(now) + 1), now[column], color=shade, linewidth=1.8)
        axes.set(title=f"{title}, iteration {measured:,}", xlabel="3x3 layer", xlim=(1, len(now)))
    responses.set(ylabel="standard deviation", ylim=(0, 1.05 * layers["response_std"].max()))
    positive = layers["gradient_norm"][layers["gradient_norm"] > 0]
    gradients.set(ylabel="norm", yscale="log", ylim=(0.8 * positive.min(), 1.25 * positive.max()))
    figure.suptitle(record.run.id, fontsize="small", color="0.35")
    figure.subplots_adjust(0.05, 0.14, 0.99, 0.86, 0.2)  # nothing moves from one figure to the next, and it is quick
    plt.close(figure)  # the notebook shows what the function returns, once
    return figure


@plt.rc_context(STYLE)
def lesion_figure(tables):
    """Errors with one block left out, a panel for each net; ``tables``: those of ``lesions`` by the net's name."""
    figure, panels = plt.subplots(1, len(tables), figsize=(5.5 * len(tables), 4), sharey=True, squeeze=False)
    for axes, (name, table) in zip(panels[0], tables.items(), strict=True):
        whole, rows = table["error"].iloc[0], table.iloc[1:]
        axes.bar(range(1, len(rows) + 1), rows["error"], color=colour(name))
        axes.axhline(whole, color="0.15", linewidth=2)
        axes.set(title=f"{spelled(name)} (line: whole net, {whole:.1f} %)", xlabel="block left out")
        axes.set(xlim=(0.4, len(rows) + 0.6), ylim=(0, 100))
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
    panels[0][0].set_ylabel("test error (%)")
    figure.tight_layout(w_pad=2)
    plt.close(figure)
    return figure


def pictures(dataset, table, most=12):
    """The first images of ``disagreements``, each with its class and what the nets take it for."""
    rows, names = table.head(most), [name for name in table if name not in ("image", "label")]
    titles = [
        "\n".join(
            [f"is {dataset.classes[label]}", *(f"{spelled(name)}: {dataset.classes[row[name]]}" for name in names)]
        )
        for label, (_, row) in zip(rows["label"], rows.iterrows(), strict=True)
    ]
    return tiles(dataset.test.pixels[rows["image"].astype(int)], titles)


@plt.rc_context(STYLE)
def tiles(images, titles, columns=6):
    """Images, (N, H, W, 3) in uint8, in rows, each below its title."""
    lines, side = -(-max(1, len(titles)) // columns), 11 / columns
    figure, grid = plt.subplots(lines, columns, figsize=(11, (side + 0.75) * lines), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, pixels, title in zip(grid.flat, images, titles, strict=False):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(title, fontsize="x-small", loc="left")
    figure.tight_layout()
    plt.close(figure)
    return figure
