"""Measures a trained run on clips and prompts that its training did not show.

    python -m vdm_jax.evaluate --out=report [--workdir=DIR | --weights=DIR] [--suite=prompts] [--count=192] [--steps=32]
        [--guidance=4] [--method=dpmpp_2m] [--seed=0] [--samplers=dpmpp_2m:16,ddim:64]
        [--data=FOLDER] [--fvd_network=FILE]
    python -m vdm_jax.evaluate --films=FOLDER --out=report

Without --workdir and --weights the reference weights of this package are measured. Writes metrics.json and
report.html (one file that can be sent on) with its pictures and clips, and prints the table.

--suite=reconstruction   held-out clips through the two autoencoders; needs no other stage
--suite=prompts          the same, retrieval, the loss by noise level, and samples of held-out prompts
--suite=words            the same as reconstruction, and samples of prompts in words that no caption has
--suite=tasks            the same as reconstruction, and held-out clips that are completed in each task
--suite=coherence        the same as reconstruction, and films of --lengths clips that begin with true frames; --count
                         films, the true film on the left of each video; see metrics/coherence.py
--suite=copies           samples compared with the clips of the training
--suite=all              everything
--samplers               samples the same prompts again by each method and number of steps; few steps are the
                         student's, if the weights have one

The same tracker reads true renders ("truth"), their reconstructions ("autoencoder") and samples of the procedural
world. For other data the table has no outcomes, and the samples are of held-out captions. Instead their distances to
the true clips are measured, see metrics/distances.py. --data=FOLDER takes all clips of another folder of videos as the
true ones. --fvd_network=FILE names the network of the Fréchet video distance. It is code: see metrics/features.py.

--films=FOLDER measures the films of a folder, whoever made them, without a model: see metrics/films.py.
"""

import functools
import logging
import time

import jax
import numpy as np
from absl import flags

from vdm_jax import sample as sample_command
from vdm_jax import samplers
from vdm_jax.data import batches, captions, text, writing
from vdm_jax.errors import UserError, one_of
from vdm_jax.metrics import (
    coherence,
    copies,
    distances,
    episodes,
    figures,
    films,
    reconstruction,
    report,
    shares,
    sound,
    tasks,
    tracker,
)
from vdm_jax.run import cli, storage
from vdm_jax.run.progress import progress
from vdm_jax.system import hard_negatives, losses
from vdm_jax.system.layout import STAGES
from vdm_jax.system.networks import to_float
from vdm_jax.tasks import MAX_STEPS
from vdm_jax.validation import SHOWN_CLIPS

logger = logging.getLogger("vdm_jax")

AUTOENCODERS = {"video": "video_autoencoder", "audio": "audio_autoencoder"}
SUITES = ("prompts", "words", "tasks", "copies", "reconstruction", "coherence", "all")
NOT_FOR_FILMS = ("workdir", "weights", "lora", "data", "suite", "count", "samplers", "lengths", "fvd_network", "steps")
CANDIDATES = 64  # clips, all of different meaning, among which a text has to find its own
NOISE_LEVELS = 8  # at which the loss is measured
ALONE = 3  # frames: an impact with no other this near counts as isolated
SHOWN = 8  # samples, or curves of films, on the page
EPISODES = 32  # films of the suite `coherence`
MAX_LENGTH = 1000  # of them, in clips of training


def main(argv):
    options = flags.FLAGS
    cli.only_options(argv)
    if not options.out:
        raise UserError("--out is missing: the folder for the report")
    began = time.perf_counter()
    if options.films:
        measure_films(options, began)
        return
    suites = SUITES if options.suite == "all" else (options.suite,)
    methods = [read_sampler(name) for name in options.samplers]
    lengths = read_lengths(options.lengths)
    stages = [*AUTOENCODERS.values()] if options.suite == "reconstruction" else STAGES
    pipe = sample_command.load_pipeline(options, stages)
    config = pipe.config
    if options.data:
        take_folder(config, options.data)
    is_world = config.data.source == "world"
    if not is_world and {"words", "tasks", "coherence"} & {*suites}:
        raise UserError(f"--suite={options.suite} is for the procedural world, whose clips the tracker reads")
    if options.count is not None:
        config.evaluate.update(clips=options.count, prompts=options.count, tasks=options.count)
    if options.data and "copies" in suites:
        raise UserError("--suite=copies compares with the clips of the training: leave out --data")
    held_out = batches.source(config, "train" if options.data else "held_out")
    out = storage.make_folder(options.out)

    items = [held_out[i] for i in range(config.evaluate.clips)]
    truth = {part: np.stack([item[part] for item in items]) for part in AUTOENCODERS}
    remade = {}
    for part, name in AUTOENCODERS.items():
        remake = functools.partial(pipe.system.reconstruct, name)
        remade[part] = batched(f"reconstructing by the {name.replace('_', ' ')}", remake, pipe, truth[part])
    asked = [tasks.objects(item) for item in items]
    metrics = {
        "truth": tracker.summarize(tasks.follow(config, asked, **truth)),
        "autoencoder": tracker.summarize(tasks.follow(config, asked, **remade)),
        "samples": tracker.summarize([]),
        "reconstruction": compare(config, items, truth, remade),
        "clip": {"recall_at_1": None},
    }
    shown = show_reconstruction(config, out, items, truth, remade)
    compared = None
    if not is_world or options.fvd_network:
        data = config.data
        compared = distances.Distances(truth, data.fps, data.sample_rate, options.fvd_network)
        metrics["distances"] = {"truth": {"clips": len(items), **compared.align(**truth)}}
        metrics["distances"]["autoencoder"] = compared.measure(**remade)

    prompts = []
    if "prompts" in suites:
        metrics["clip"] = recall(pipe, held_out)
        metrics["loss_per_noise_level"] = loss_per_noise_level(pipe, items, truth, options.seed)
        prompts = choose_prompts(config, held_out, options.seed)
        video, audio, found = sample(pipe, prompts, seed=options.seed)
        metrics["samples"], counts = tracker.summarize(found), tracker.counts(found)
        if compared:
            metrics["distances"]["samples"] = compared.measure(video, audio)
        shown = show_samples(config, out, prompts, video, audio) + shown
        if is_world:
            others = choose_prompts(config, held_out, options.seed, wordings=True)
            measured = tracker.summarize(sample(pipe, others)[-1])
            metrics["wordings"] = {key: measured[key] for key in ("one_object", "two_objects", "empty")}
        if methods:
            metrics |= {"samplers": {}, "differences": {}}
        for method, steps in methods:
            maker = pipe.for_steps(steps, False if options.teacher else None)
            found = sample(maker, prompts, seed=options.seed, method=method, steps=steps)[-1]
            measured, other_counts = tracker.summarize(found), tracker.counts(found)
            differences = {key: shares.difference(other_counts[key], counts[key]) for key in report.OUTCOMES}
            metrics["samplers"][f"{method} {steps}"] = {key: measured[key] for key in report.OUTCOMES}
            metrics["differences"][f"{method} {steps}"] = differences
    if "words" in suites:
        others = captions.prompts_in_unknown_words(**known_things(config))[: config.evaluate.prompts]
        measured = tracker.summarize(sample(pipe, others, seed=options.seed)[-1])
        metrics["unknown_words"] = {key: measured[key] for key in ("one_object", "direction", "empty")}
        metrics["unknown_words"]["prompts"] = len(others)
    if "tasks" in suites:
        metrics["tasks"] = tasks.measure(pipe, [held_out[i] for i in range(config.evaluate.tasks)], options.seed)
    if "copies" in suites:
        video, _ = pipe.sample([item["caption"] for item in items], seed=options.seed)
        metrics["copies"] = copies.measure(pipe, video, truth["video"], config.evaluate.copies)

    if "coherence" in suites:
        count = options.count or EPISODES
        metrics["coherence"], found = episodes.measure(pipe, held_out, count, lengths, options.seed, batched)
        shown = show_films(config, out, found) + shown

    settings = {
        "weights": cli.weights_folder(options) or "reference",
        **({"adapters": ", ".join(options.lora)} if options.lora else {}),
        "data": options.data or config.data.source,
        count_name(config, options.data): len(items),
        **({"FVD network": options.fvd_network} if options.fvd_network else {}),
        "prompts": len(prompts),
        **{key.replace("_", " "): config.sample[key] for key in ("method", "steps", "first_step_times", "rescale")},
        **{f"guidance {name.replace('_', ' ')}": weight for name, weight in config.sample.guidance.items()},
        "seed": options.seed,
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.perf_counter() - began),
    }
    page = report.write_report(out, metrics, settings=settings, media=shown)
    print(report.format_table(metrics))
    logger.info("wrote %s in %d s", page, time.perf_counter() - began)


def measure_films(options, began):
    """Measures the films of --films. Raises UserError for another flag, and where there is no film."""
    for name in NOT_FOR_FILMS:
        if options[name].present:
            raise UserError(f"--{name} is not for --films, which needs no model: leave it out")
    measured = films.measure_folder(options.films, progress)
    out = storage.make_folder(options.out)
    titles = {key: f"{report.LABELS[key][0]} ({films.AXES[key]})" for key in films.SCORES}
    shown = [("Mean of all films", out / "films.png", measured["curves"])]
    for number, (name, film) in enumerate([*measured["films"].items()][:SHOWN]):
        shown.append((name, out / f"film_{number:03d}.png", film["curves"]))
    for _, path, curves in shown:
        drawn = {titles[key]: (curves[key]["seconds"], curves[key]["value"]) for key in films.SCORES if key in curves}
        figures.curves(path, drawn)
    settings = {
        "folder": options.films,
        "films": len(measured["films"]),
        "seconds": round(time.perf_counter() - began),
    }
    page = report.write_films(out, measured, settings=settings, media=[item[:2] for item in shown])
    print(report.format_tables(report.film_tables(measured)))
    logger.info("wrote %s in %d s", page, time.perf_counter() - began)


def take_folder(config, path):
    """Changes a config so that all clips of a folder of videos are measured."""
    with config.unlocked():
        config.data.update(source="files", path=path)
        config.data.files = {"held_out": 0.0}


def count_name(config, folder):
    """What the measured clips are called on the page."""
    if folder:
        return "clips of the folder"
    return "held-out clips" if batches.holds_out(config) else "clips of training"


def read_sampler(name):
    """'dpmpp_2m:16' -> ('dpmpp_2m', 16). Raises UserError."""
    method, _, steps = name.partition(":")
    one_of("sampler", method, tuple(samplers.METHODS))
    if not steps.isdecimal() or not 0 < int(steps) <= MAX_STEPS:
        raise UserError(f"--samplers={name}: want a method and a number of steps, such as {method}:16")
    return method, int(steps)


def read_lengths(texts):
    """['1', '4'] -> (1, 4), lengths in clips of training. Raises UserError."""
    if not all(text.isdecimal() and 0 < int(text) <= MAX_LENGTH for text in texts) or not texts:
        raise UserError(f"--lengths={','.join(texts)}: want whole numbers from 1 to {MAX_LENGTH}, such as 1,2,4")
    return tuple(sorted({int(text) for text in texts}))


def batched(what, function, pipe, *arrays):
    """function(pipe.params, *rows) in batches of config.evaluate.batch_size, jitted; the last batch is filled up.

    arrays: trees of [N, ...] with one N. Returns function's tree with leaves [N, ...], on the host.
    """
    count = len(jax.tree.leaves(arrays)[0])
    size = min(pipe.config.evaluate.batch_size, count)
    function, parts = jax.jit(function), []
    with progress(what, count, "clip") as advance:
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            parts.append(jax.device_get(function(pipe.params, *jax.tree.map(lambda a, rows=rows: a[rows], arrays))))
            advance(min(size, count - start))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def sample(pipe, prompts, **options):
    """-> (video, audio, what the tracker finds in each clip) of prompts, as `choose_prompts` returns them."""
    video, audio = pipe.sample([prompt["text"] for prompt in prompts], **options)
    return video, audio, tasks.follow(pipe.config, [prompt["objects"] for prompt in prompts], video, audio)


def choose_prompts(config, held_out, seed, wordings=False):
    """[{'text', 'objects'}] that ask for nothing that the previews of training show.

    Of the world, config.evaluate.prompts of one object, and as many of two where it has two; else held-out captions.
    wordings: of the world, in words that training did not combine.
    """
    count, shown = config.evaluate.prompts, [held_out[i] for i in range(SHOWN_CLIPS)]
    if config.data.source != "world":
        texts = [held_out[SHOWN_CLIPS + i]["caption"] for i in range(count)]
        fresh = [caption for caption in texts if caption not in {item["caption"] for item in shown}]
        if not fresh:
            logger.warning("too few captions: the samples here have the same captions as the previews of training")
        return [{"text": caption, "objects": None} for caption in fresh or texts]

    known = known_things(config)
    meanings = {captions.meaning(item["state"]) for item in shown}
    prompts = []
    for number, chance in enumerate(config.data.world.objects[:2], 1):
        if chance > 0:
            drawn = captions.prompts(seed, 4 * count + 64, number, **known, held_out=wordings)
            fresh = [p for p in drawn if tuple(sorted(tuple(o.values()) for o in p["objects"])) not in meanings]
            prompts += fresh[:count]
    if not prompts:
        raise UserError("no prompts of one or two objects are left that previews do not show: allow more in data.world")
    return prompts


def known_things(config):
    """{'shapes', 'colors'} of the world, as `captions.prompts` takes them; without those that the config leaves out."""
    return {key: config.data.world[key] for key in ("shapes", "colors") if key in config.data.world}


def compare(config, items, truth, remade):
    """PSNR (dB) and SSIM over all frames, the median SI-SDR (dB) of clips that sound, `sound.measure`, and of the world
    `onset_errors`.
    """
    ratios = reconstruction.si_sdr(truth["audio"], remade["audio"])
    ratios = ratios[~np.isnan(ratios)]  # nan: silence
    metrics = {
        "psnr": reconstruction.psnr(truth["video"], remade["video"]),
        "ssim": float(np.mean([reconstruction.ssim(a, b) for a, b in zip(truth["video"], remade["video"])])),
        "si_sdr": float(np.median(ratios)) if len(ratios) else None,
        **sound.measure(truth["audio"], remade["audio"], config.data.fps, config.data.sample_rate),
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
    for item, waveform in zip(items, audio, strict=True):
        impacts = np.array([e["time"] for e in item["state"]["events"] if e["kind"] != "turn"])  # a turn is silent
        heard = tracker.onsets(waveform, config.data.sample_rate)
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

    if "clip" in pipe.system.parts:
        return {"recall_at_1": None}

    def embed(params, tokens, video):
        return pipe.system.apply("clip", params, tokens, text.mask(tokens), to_float(video))[:2]

    texts = [item["caption"] for item in different.values()]
    video = np.stack([item["video"] for item in different.values()])
    tokens = pipe.system.tokenize(texts)
    words, pictures = batched("embedding captions and clips", embed, pipe, tokens, video)
    found = {"recall_at_1": reconstruction.recall_at_k(words, pictures), "candidates": len(texts)}
    if groups := config.clip.hard_negatives.words:
        tokens = pipe.system.tokenize([hard_negatives.swap_words(caption, groups) for caption in texts])
        others, _ = batched("embedding hard negatives", embed, pipe, tokens, video)
        found["hard_negative_accuracy"] = float(np.mean(np.sum(pictures * words, 1) > np.sum(pictures * others, 1)))
    return found


def loss_per_noise_level(pipe, items, truth, seed):
    """Mean squared error of the noise (eps) that the denoiser predicts in held-out latents, all at one noise level.

    -> columns {'log_snr', 'video', 'audio'} of NOISE_LEVELS numbers each. The levels are evenly spaced over the range
    of training, and all get the same noise.
    """
    system = pipe.system
    levels = losses.noise_levels(system, NOISE_LEVELS)

    def errors(params, clips, tokens, eps):
        z, cond = system.encode(params, **clips), system.encode_text(params, tokens)
        cond |= system.unknown_control(z["video"].shape[1], len(tokens))
        denoise_fn = functools.partial(system.apply, "denoiser", params)
        return losses.errors_per_noise_level(system, denoise_fn, z, cond, eps, levels)

    tokens = pipe.system.tokenize([item["caption"] for item in items])
    rng, shapes = np.random.default_rng(seed), system.layout.latent_shapes
    eps = {name: rng.standard_normal((len(items), *shapes[name]), np.float32) for name in sorted(shapes)}
    found = batched(f"loss at {NOISE_LEVELS} noise levels", errors, pipe, truth, tokens, eps)
    return {"log_snr": levels.tolist(), **{name: found[name].mean(0).tolist() for name in AUTOENCODERS}}


def show_samples(config, out, prompts, video, audio):
    """A contact sheet and MP4s of up to SHOWN samples, spread over the prompts -> [(caption, file)]."""
    chosen = np.linspace(0, len(prompts) - 1, min(SHOWN, len(prompts))).round().astype(int)
    captions = [prompts[i]["text"] for i in chosen]
    figures.contact_sheet(out / "samples.png", video[chosen], captions)
    paths = [out / f"sample_{i:03d}.mp4" for i in chosen]
    for i, path in zip(chosen, paths):
        writing.write_mp4(path, video[i], audio[i], config.data.fps, config.data.sample_rate)
    return [("Samples", out / "samples.png"), *zip(captions, paths)]


def show_films(config, out, films):
    """MP4s of films, the true one on the left and the model's on the right with its sound -> [(caption, file)]."""
    pairs = np.concatenate([films["truth"], films["samples"]], 3)  # side by side
    paths = [out / f"film_{i:03d}.mp4" for i in range(min(SHOWN, len(pairs)))]
    for path, video, audio in zip(paths, pairs, films["sound"]):
        writing.write_mp4(path, video, audio, config.data.fps, config.data.sample_rate)
    return [("left: the true film, right: the model's", path) for path in paths]


def show_reconstruction(config, out, items, truth, remade):
    """Held-out clips, each followed by its reconstruction: pictures, sounds and one pair of MP4s."""
    video, audio = (
        [x for pair in zip(truth[part][:SHOWN_CLIPS], remade[part]) for x in pair] for part in ("video", "audio")
    )
    labels = [label for item in items[:SHOWN_CLIPS] for label in (item["caption"], "reconstruction")]
    figures.contact_sheet(out / "reconstruction.png", video, labels)
    figures.spectrogram(out / "spectrogram.png", np.concatenate(audio), config.data.sample_rate)
    for name, clips in (("truth", truth), ("autoencoder", remade)):
        path = out / f"{name}.mp4"
        writing.write_mp4(path, clips["video"][0], clips["audio"][0], config.data.fps, config.data.sample_rate)
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
    flags.DEFINE_integer("count", None, "Held-out clips, prompts of a kind, clips of a task, and films.", 1, 10**6)
    flags.DEFINE_list("lengths", [*map(str, coherence.LENGTHS)], "Lengths of films of --suite=coherence, in clips.")
    flags.DEFINE_string("data", None, "Folder of videos to measure on, in place of the held-out clips.")
    flags.DEFINE_string("films", None, "Folder of films to measure without a model.")
    flags.DEFINE_string("fvd_network", None, "TorchScript or ONNX file for the Frechet video distance. It is code.")
    flags.DEFINE_list("samplers", [], "Also sample by each of these, such as dpmpp_2m:16,ddim:64.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
