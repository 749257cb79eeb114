"""The table that bench and dry_run print."""

GIB = 2**30


def show(results):
    """Prints a line for each figure and a column for each result, a dict {figure: value}."""
    keys = dict.fromkeys(key for result in results for key in result)
    rows = [[key, *(text(key, result.get(key)) for result in results)] for key in keys]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def text(key, value):
    """Returns a figure as text with its unit."""
    if value is None:
        return "-"
    if key == "suggestions":
        outcomes = {True: " (fits)", False: " (does not)", None: ""}
        return "; or ".join(x["change"] + outcomes[x.get("fits")] for x in value) or "a larger slice"
    if isinstance(value, dict):
        return " ".join(f"{k} {text(key, v)}" for k, v in value.items()) or "-"
    if isinstance(value, list):
        return " to ".join(text(key, x) for x in value)
    if isinstance(value, str | bool):
        return {True: "yes", False: "no"}.get(value, value)
    if "bytes" in key:
        return f"{value / GIB:.3f} GiB"
    if "share" in key:
        return f"{100 * value:.0f} %"
    if key == "roofline_seconds":
        return f"{1e3 * value:.2f} ms, a bound"
    if key.endswith("flops_per_chip"):
        return f"{value / 1e12:.4g} TFLOP"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
