"""Measures a trained run on clips and prompts that its training did not show.

    python -m vdm_jax.evaluate --out=report [--workdir=DIR | --weights=DIR] [--suite=prompts] [--count=192] [--steps=32]
        [--guidance=4] [--method=dpmpp_2m] [--seed=0] [--samplers=dpmpp_2m:16,ddim:64]

Without --workdir and --weights the reference weights of this package are measured. Writes metrics.json and
report.html (one file that can be sent on) with its pictures and clips, and prints the table.

--suite=reconstruction   held-out clips through the two autoencoders; needs no other stage
--suite=prompts          the same, retrieval, the loss by noise level, and samples of held-out prompts
--suite=tasks            the same as reconstruction, and held-out clips that are completed in each task
--suite=copies           samples compared with the clips of the training
--suite=all              everything
--samplers               samples the same prompts again by each method and number of steps; few steps are the
                         student's, if the weights have one

The same tracker reads true renders ("truth"), their reconstructions ("autoencoder") and samples of the procedural
world. For other data the table has no outcomes, and the samples are of held-out captions.
"""

import functools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vdm_jax import diffusion, samplers
from vdm_jax import sample as sample_command
from vdm_jax.data import batches, captions, media, text
from vdm_jax.errors import UserError, one_of
from vdm_jax.metrics import copies, reconstruction, report, shares, tasks, tracker
from vdm_jax.metrics import figures as drawing
from vdm_jax.run import cli, storage
from vdm_jax.run.progress import progress
from vdm_jax.system import hard_negatives
from vdm_jax.system.codec import to_float
from vdm_jax.system.layout import STAGES

logger = logging.getLogger("vdm_jax")

AUTOENCODERS = {"video": "video_autoencoder", "audio": "audio_autoencoder"}
SUITES = ("prompts", "tasks", "copies", "reconstruction", "all")
CANDIDATES = 64  # clips, all of different meaning, among which a text has to find its own
NOISE_LEVELS = 8  # at which the loss is measured
ALONE = 3  # frames: an impact with no other this near counts as isolated
PREVIEW_CLIPS = 4  # held-out clips that previews of training show
SHOWN = 8  # samples on the page


def main(argv):
    options = flags.FLAGS
    cli.only_options(argv)
    if not options.out:
        raise UserError("--out is missing: the folder for the report")
    began = time.perf_counter()
    with_prompts = options.suite in ("prompts", "all")
    with_tasks = options.suite in ("tasks", "all")
    methods = [read_sampler(name) for name in options.samplers]
    with_copies = options.suite in ("copies", "all")
    with_samples = with_prompts or with_tasks or with_copies
    pipe = sample_command.load_pipeline(options, STAGES if with_samples else [*AUTOENCODERS.values()])
    config = pipe.config
    if with_tasks and config.data.source != "world":
        raise UserError("--suite=tasks is for the procedural world, whose clips the tracker reads")
    if options.count is not None:
        config.evaluate.update(clips=options.count, prompts=options.count, tasks=options.count)
    held_out, out = batches.source(config, "held_out"), storage.make_folder(options.out)

    items = [held_out[i] for i in range(config.evaluate.clips)]
    truth = {part: np.stack([item[part] for item in items]) for part in AUTOENCODERS}
    remade = {part: reconstruct(pipe, name, truth[part]) for part, name in AUTOENCODERS.items()}
    asked = [tasks.objects(item) for item in items]
    metrics = {
        "truth": tracker.summarize(follow(config, truth, asked)),
        "autoencoder": tracker.summarize(follow(config, remade, asked)),
        "samples": tracker.summarize([]),
        "reconstruction": compare(config, items, truth, remade),
        "clip": {"recall_at_1": None},
    }
    figures = show_reconstruction(config, out, items, truth, remade)

    prompts = []
    if with_prompts:
        metrics["clip"] = recall(pipe, held_out)
        metrics["loss_per_noise_level"] = loss_per_noise_level(pipe, items, truth, options.seed)
        prompts = choose_prompts(config, held_out, options.seed)
        texts = [prompt["text"] for prompt in prompts]
        wanted = [prompt["objects"] for prompt in prompts]
        made = dict(zip(AUTOENCODERS, pipe.sample(texts, seed=options.seed)))
        found = follow(config, made, wanted)
        metrics["samples"] = tracker.summarize(found)
        figures = show_samples(config, out, texts, made) + figures
        if config.data.source == "world":
            metrics["wordings"] = measure_wordings(pipe, choose_prompts(config, held_out, options.seed, wordings=True))
        if methods:
            metrics |= {"samplers": {}, "differences": {}}
        for method, steps in methods:
            maker = pipe.for_steps(steps, False if options.teacher else None)
            made = dict(zip(AUTOENCODERS, maker.sample(texts, seed=options.seed, method=method, steps=steps)))
            others = follow(config, made, wanted)
            measured, both = tracker.summarize(others), (tracker.counts(others), tracker.counts(found))
            metrics["samplers"][f"{method} {steps}"] = {key: measured[key] for key in report.OUTCOMES}
            differences = {key: shares.difference(*(counts[key] for counts in both)) for key in report.OUTCOMES}
            metrics["differences"][f"{method} {steps}"] = differences
    if with_tasks:
        metrics["tasks"] = tasks.measure(pipe, [held_out[i] for i in range(config.evaluate.tasks)], options.seed)
    if with_copies:
        texts = [item["caption"] for item in items]
        video, _ = pipe.sample(texts, seed=options.seed)
        metrics["copies"] = copies.measure(pipe, video, truth["video"], config.evaluate.copies)

    settings = {
        "weights": cli.weights_folder(options) or "reference",
        "data": config.data.source,
        "held-out clips": len(items),
        "prompts": len(prompts),
        **{key.replace("_", " "): config.sample[key] for key in ("method", "steps", "first_step_times", "rescale")},
        **{f"guidance {name.replace('_', ' ')}": weight for name, weight in config.sample.guidance.items()},
        "seed": options.seed,
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.perf_counter() - began),
    }
    page = report.write_report(out, metrics, settings=settings, media=figures)
    print(report.format_table(metrics))
    logger.info("wrote %s in %d s", page, time.perf_counter() - began)


def read_sampler(name):
    """'dpmpp_2m:16' -> ('dpmpp_2m', 16). Raises UserError."""
    method, _, steps = name.partition(":")
    one_of("sampler", method, tuple(samplers.METHODS))
    if not steps.isdecimal() or not 0 < int(steps) <= 10_000:
        raise UserError(f"--samplers={name}: want a method and a number of steps, such as {method}:16")
    return method, int(steps)


def batched(what, function, config, *arrays):
    """function(*rows) in batches of config.evaluate.batch_size, the last one filled up, so that it compiles once.

    arrays: trees of [N, ...] with one N. Returns function's tree with leaves [N, ...], on the host.
    """
    count = len(jax.tree.leaves(arrays)[0])
    size = min(config.evaluate.batch_size, count)
    parts = []
    with progress(what, count, "clip") as advance:
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            parts.append(jax.device_get(function(*jax.tree.map(lambda a, rows=rows: a[rows], arrays))))
            advance(min(size, count - start))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def follow(config, clips, asked):
    """What the tracker finds in each of P clips; [] where nothing is asked. asked: P lists of objects, or of None."""
    if not asked or asked[0] is None:
        return []
    found, size = [], config.evaluate.batch_size
    with progress("tracking objects", len(asked), "clip") as advance:
        for start in range(0, len(asked), size):
            rows = slice(start, start + size)
            for video, audio, want in zip(clips["video"][rows], clips["audio"][rows], asked[rows], strict=True):
                found.append(tracker.measure(video, audio, config.data.fps, config.data.sample_rate, want))
            advance(len(asked[rows]))
    return found


def measure_wordings(pipe, prompts):
    """The outcomes of prompts in words that training did not combine, {'one_object', 'two_objects', 'empty'}."""
    made = dict(zip(AUTOENCODERS, pipe.sample([prompt["text"] for prompt in prompts])))
    measured = tracker.summarize(follow(pipe.config, made, [prompt["objects"] for prompt in prompts]))
    return {key: measured[key] for key in ("one_object", "two_objects", "empty")}


def choose_prompts(config, held_out, seed, wordings=False):
    """[{'text', 'objects'}] that ask for nothing that the previews of training show.

    Of the world, config.evaluate.prompts of one object, and as many of two where it has two; else held-out captions.
    wordings: of the world, in words that training did not combine.
    """
    count, shown = config.evaluate.prompts, [held_out[i] for i in range(PREVIEW_CLIPS)]
    if config.data.source != "world":
        texts = [held_out[PREVIEW_CLIPS + i]["caption"] for i in range(count)]
        fresh = [caption for caption in texts if caption not in {item["caption"] for item in shown}]
        if not fresh:
            logger.warning("too few captions: the samples here have the same captions as the previews of training")
        return [{"text": caption, "objects": None} for caption in fresh or texts]

    settings = config.data.world
    known = {key: settings[key] for key in ("shapes", "colors") if key in settings}
    meanings = {captions.meaning(item["state"]) for item in shown}
    prompts = []
    for number, chance in enumerate(settings.objects[:2], 1):
        if chance > 0:
            drawn = captions.prompts(seed, 4 * count + 64, number, **known, held_out=wordings)
            fresh = [p for p in drawn if tuple(sorted(tuple(o.values()) for o in p["objects"])) not in meanings]
            prompts += fresh[:count]
    if not prompts:
        raise UserError("no prompts of one or two objects are left that previews do not show: allow more in data.world")
    return prompts


def reconstruct(pipe, name, clips):
    """Clips [P, ...] of one modality through autoencoder `name` and back."""
    remake = jax.jit(lambda params, x: pipe.system.reconstruct(name, params, x))
    what = f"reconstructing by the {name.replace('_', ' ')}"
    return batched(what, functools.partial(remake, {name: pipe.params[name]}), pipe.config, clips)


def compare(config, items, truth, remade):
    """PSNR (dB) and SSIM over all frames, the median SI-SDR (dB) of clips that sound, and `onset_errors`."""
    ratios = reconstruction.si_sdr(truth["audio"], remade["audio"])
    ratios = ratios[~np.isnan(ratios)]  # nan: silence
    metrics = {
        "psnr": reconstruction.psnr(truth["video"], remade["video"]),
        "ssim": float(np.mean([reconstruction.ssim(a, b) for a, b in zip(truth["video"], remade["video"])])),
        "si_sdr": float(np.median(ratios)) if len(ratios) else None,
        "onset_within_half_frame": None,
    }
    if config.data.source == "world":
        metrics |= onset_errors(config, items, remade["audio"])
        metrics["true_onset_within_half_frame"] = onset_errors(config, items, truth["audio"])["onset_within_half_frame"]
    return metrics


def onset_errors(config, items, audio):
    """Impacts against the onsets heard in `audio` [P, N]: shares with an onset of their own within half a frame.

    Of all impacts, and of those with no other within ALONE frames; and the median error of the times, in ms.
    """
    fps, errors, counts = config.data.fps, [], []
    for item, sound in zip(items, audio, strict=True):
        impacts = np.array([e["time"] for e in item["state"]["events"] if e["kind"] != "turn"])  # a turn is silent
        heard = tracker.onsets(sound, config.data.sample_rate)
        apart = np.abs(impacts[:, None] - impacts) + np.where(np.eye(len(impacts)), np.inf, 0)
        alone = impacts[apart.min(1, initial=np.inf) > ALONE / fps]
        paired, paired_alone = (reconstruction.onset_errors(times, heard, 0.5 / fps) for times in (impacts, alone))
        errors.extend(paired)
        counts.append((len(paired), len(impacts), len(paired_alone), len(alone)))
    partners, total, partners_alone, total_alone = np.sum(counts, 0)
    return {
        "onset_within_half_frame": partners / total if total else None,
        "onset_within_half_frame_isolated": partners_alone / total_alone if total_alone else None,
        "onset_error_ms": 1e3 * float(np.median(np.abs(errors))) if errors else None,
    }


def recall(pipe, held_out):
    """Share of texts that find their clip first, among up to CANDIDATES clips that all differ in meaning."""
    config = pipe.config
    different = {}
    for i in range(4 * CANDIDATES if config.data.source == "world" else CANDIDATES):  # a film costs more to read
        item = held_out[i]
        different.setdefault(captions.meaning(item["state"]) if "state" in item else item["caption"], item)
        if len(different) == CANDIDATES:
            break
    if len(different) < 2:
        return {"recall_at_1": None, "candidates": len(different)}

    @jax.jit
    def embed(params, tokens, video):
        return pipe.system.apply("clip", params, tokens, text.mask(tokens), to_float(video))[:2]

    embed = functools.partial(embed, {"clip": pipe.params["clip"]})
    texts = [item["caption"] for item in different.values()]
    video = np.stack([item["video"] for item in different.values()])
    tokens = text.encode(texts, config.data.text_length)
    words, pictures = batched("embedding captions and clips", embed, config, tokens, video)
    found = {"recall_at_1": reconstruction.recall_at_k(words, pictures), "candidates": len(texts)}
    if groups := config.clip.hard_negatives.words:
        tokens = text.encode([hard_negatives.swap_words(caption, groups) for caption in texts], config.data.text_length)
        others, _ = batched("embedding hard negatives", embed, config, tokens, video)
        right, wrong = (np.sum(pictures * x, 1) for x in (words, others))
        found["hard_negative_accuracy"] = float(np.mean(right > wrong))
    return found


def loss_per_noise_level(pipe, items, truth, seed):
    """Mean squared error of the noise (eps) that the denoiser predicts in held-out latents, all at one noise level.

    -> columns {'log_snr', 'video', 'audio'} of NOISE_LEVELS numbers each, evenly spaced over the range of training. The
    same noise is used at each level.
    """
    config, system, params = pipe.config, pipe.system, pipe.params
    settings = config.denoiser.diffusion

    @jax.jit
    def encode(params, clips, tokens):
        return system.encode(params, clips["video"], clips["audio"]), system.encode_text(params, tokens)

    @jax.jit
    def errors(params, noise_level, z, eps, cond):
        shape = z["video"].shape[:2]  # [B, T]
        log_snr = {name: jnp.full(shape, noise_level) for name in z}
        prediction = system.apply("denoiser", params, diffusion.add_noise(z, eps, log_snr), log_snr, cond)
        target = diffusion.to_target(z, eps, log_snr, settings.target)
        factor = diffusion.eps_error_factor(noise_level, settings.target)
        return {name: factor * jnp.square(prediction[name] - target[name]).reshape(shape[0], -1).mean(1) for name in z}

    tokens = text.encode([item["caption"] for item in items], config.data.text_length)
    z, cond = batched("encoding clips", functools.partial(encode, params), config, truth, tokens)
    rng = np.random.default_rng(seed)
    eps = {name: rng.standard_normal(x.shape, np.float32) for name, x in z.items()}
    low, high = settings.log_snr_min, settings.log_snr_max
    log_snr = (low + (np.arange(NOISE_LEVELS) + 0.5) / NOISE_LEVELS * (high - low)).tolist()

    def errors_by_level(*rows):
        return [errors(params, jnp.float32(noise_level), *rows) for noise_level in log_snr]

    by_level = batched(f"loss at {NOISE_LEVELS} noise levels", errors_by_level, config, z, eps, cond)
    return {"log_snr": log_snr, **{name: [float(found[name].mean()) for found in by_level] for name in AUTOENCODERS}}


def show_samples(config, out, texts, made):
    """A contact sheet and MP4s of up to SHOWN samples, spread over the prompts -> [(caption, file)]."""
    chosen = np.linspace(0, len(texts) - 1, min(SHOWN, len(texts))).round().astype(int)
    drawing.contact_sheet(out / "samples.png", made["video"][chosen], [texts[i] for i in chosen])
    figures = [("Samples", out / "samples.png")]
    for i in chosen:
        path = out / f"sample_{i:03d}.mp4"
        media.write_mp4(path, made["video"][i], made["audio"][i], config.data.fps, config.data.sample_rate)
        figures.append((texts[i], path))
    return figures


def show_reconstruction(config, out, items, truth, remade):
    """Held-out clips, each followed by its reconstruction: pictures, sounds and one pair of MP4s."""
    pairs = {part: [x for pair in zip(truth[part], remade[part]) for x in pair][: 2 * PREVIEW_CLIPS] for part in truth}
    labels = [label for item in items[:PREVIEW_CLIPS] for label in (item["caption"], "reconstruction")]
    drawing.contact_sheet(out / "reconstruction.png", pairs["video"], labels)
    drawing.spectrogram(out / "spectrogram.png", np.concatenate(pairs["audio"]), config.data.sample_rate)
    for name, clips in (("truth", truth), ("autoencoder", remade)):
        path = out / f"{name}.mp4"
        media.write_mp4(path, clips["video"][0], clips["audio"][0], config.data.fps, config.data.sample_rate)
    return [
        ("Held-out clips and their reconstructions", out / "reconstruction.png"),
        ("Sound of the same clips, each followed by its reconstruction", out / "spectrogram.png"),
        (f"Truth: {labels[0]}", out / "truth.mp4"),
        ("Its reconstruction", out / "autoencoder.mp4"),
    ]


def define_flags():
    sample_command.define_run_flags()
    flags.DEFINE_string("out", None, "Folder for the report.")
    flags.DEFINE_enum("suite", "prompts", SUITES, "What to measure.")
    flags.DEFINE_integer("count", None, "Held-out clips, prompts of a kind, and clips of a task.", lower_bound=1)
    flags.DEFINE_list("samplers", [], "Also sample by each of these, such as dpmpp_2m:16,ddim:64.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
