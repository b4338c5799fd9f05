"""The web UI's interface, by an unmodified client of it: `webuiapi`. Images are the library's, to the bit."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("fastapi")
webuiapi = pytest.importorskip("webuiapi")

from PIL import Image, ImageDraw  # noqa: E402
from server_a1111 import image_in, pixels, running  # noqa: E402

from sd import StableDiffusion  # noqa: E402
from sd.control_params import Control  # noqa: E402
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage  # noqa: E402
from sd.resources import EMBEDDED_CONTROLS, EMBEDDED_LORA, resource  # noqa: E402
from sd.server.settings import ServerSettings  # noqa: E402

SIZE = {"width": 128, "height": 128}
FEW = {"steps": 3, "seed": 5, "cfg_scale": 4, **SIZE}
SAME = {"steps": 3, "seed": 5, "guidance": 4.0, "sampler": "euler_a", **SIZE, "web_ui_prompts": True}
PROMPT, NEGATIVE = "a (red:1.2) house", "fog"


@pytest.fixture(scope="module")
def address():
    with running(ServerSettings(max_batch=4)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def api(address):
    return webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1")


@pytest.fixture(scope="module")
def library():
    model = StableDiffusion.load()
    model.add_control(resource(EMBEDDED_CONTROLS["edges"]), "edges")
    return model


def expected(library, request):
    return pixels(library.prepare(request).result().images)


def picture(width=128, height=128):
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    ImageDraw.Draw(image).rectangle((width // 4, height // 4, width // 2, height // 2), "orange")
    return image


def test_txt2img_is_the_librarys_image(api, library):
    result = api.txt2img(prompt=PROMPT, negative_prompt=NEGATIVE, **FEW)
    assert pixels(result.images) == expected(library, TextToImage.of(PROMPT, NEGATIVE, **SAME))
    info = result.info
    assert info["ignored"] == [] and info["notes"] == []  # all that this client sends is understood
    assert (info["seed"], info["all_seeds"], info["steps"], info["cfg_scale"]) == (5, [5], 3, 4.0)
    assert (info["sampler_name"], info["width"], info["height"]) == ("Euler a", 128, 128)
    assert info["sd_model_name"] == "pocket" and len(info["sd_model_hash"]) == 10
    assert info["infotexts"] == [result.image.info["parameters"]]
    assert result.parameters["prompt"] == PROMPT and result.parameters["sampler_index"] == "Euler a"


def test_png_info_reads_what_was_written(api):
    image = api.txt2img(prompt=PROMPT, negative_prompt=NEGATIVE, **FEW).image
    found = api.png_info(image)
    assert found.info == image.info["parameters"] and found.json["items"]["parameters"] == found.info
    assert found.parameters["Prompt"] == PROMPT and found.parameters["Negative prompt"] == NEGATIVE
    assert (found.parameters["Seed"], found.parameters["Size-1"]) == ("5", "128")


def test_batches_go_on_with_the_seeds(api, library):
    result = api.txt2img(prompt="a tree", batch_size=2, n_iter=2, **FEW)
    assert result.info["all_seeds"] == [5, 6, 7, 8] and result.info["index_of_first_image"] == 0
    both = [TextToImage.of("a tree", **{**SAME, "seed": seed, "n": 2}) for seed in (5, 7)]
    assert pixels(result.images) == [image for request in both for image in expected(library, request)]


def test_variations_keep_the_seed(api, library):
    result = api.txt2img(prompt="a tree", subseed=9, subseed_strength=0.3, n_iter=2, **FEW)
    assert result.info["all_seeds"] == [5, 5] and result.info["all_subseeds"] == [9, 10]
    both = [TextToImage.of("a tree", **SAME, variation_seed=seed, variation_strength=0.3) for seed in (9, 10)]
    assert pixels(result.images) == [image for request in both for image in expected(library, request)]


def test_random_seeds_are_told(api):
    seeds = {api.txt2img(prompt="a", steps=1, **SIZE).info["seed"] for _ in range(2)}
    assert len(seeds) == 2 and min(seeds) >= 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"sampler_name": "DPM++ 2M Karras"}, {"sampler": "dpmpp_2m", "spacing": "karras"}),
        ({"sampler_name": "DPM++ 2M", "scheduler": "SGM Uniform"}, {"sampler": "dpmpp_2m", "spacing": "sgm"}),
        ({"sampler_name": "Euler", "scheduler": "Karras"}, {"sampler": "euler", "spacing": "karras"}),
        ({"sampler_name": "DDIM", "eta": 1.0}, {"sampler": "ddim", "eta": 1.0, "spacing": "leading"}),
        ({"sampler_name": "k_euler", "scheduler": "Simple"}, {"sampler": "euler", "spacing": "trailing"}),
        ({"override_settings": {"randn_source": "NV"}}, {"rng": "nv"}),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, {"noise_seed_delta": 31337}),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, {"clip_skip": 2}),
        ({"tiling": True}, {"tileable": True}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_settings_mean_what_they_mean_there(api, library, given, same):
    result = api.txt2img(prompt="a tree", **{**FEW, **given})
    assert result.info["ignored"] == []
    assert pixels(result.images) == expected(library, TextToImage.of("a tree", **{**SAME, **same}))


@pytest.mark.exhaustive
def test_hires_fix(api, library):
    result = api.txt2img(
        prompt="a tree", enable_hr=True, hr_scale=1.5, hr_second_pass_steps=2, denoising_strength=0.6, **FEW
    )
    settings = {"hires": 1.5, "hires_steps": 2, "hires_strength": 0.6, "hires_upscaler": "latent"}
    assert result.image.size == (192, 192) and result.info["ignored"] == []
    assert pixels(result.images) == expected(library, HighRes.of("a tree", **SAME, **settings))
    sized = api.txt2img(
        prompt="a tree", enable_hr=True, hr_resize_x=192, hr_upscaler="R-ESRGAN 4x+", denoising_strength=0.6, **FEW
    )
    settings = {"hires": 1.5, "hires_steps": 3, "hires_strength": 0.6, "hires_upscaler": "lanczos"}
    assert pixels(sized.images) == expected(library, HighRes.of("a tree", **SAME, **settings))
    assert any("R-ESRGAN 4x+" in note for note in sized.info["notes"])


def test_loras_in_prompts(api, library):
    name = library.add_lora(resource(EMBEDDED_LORA), 0.7)
    try:
        same = expected(library, TextToImage.of("a tree", **SAME))
    finally:
        library.remove_lora(name)
    result = api.txt2img(prompt="a tree<lora:pocket-lcm:0.7>", **FEW)
    assert pixels(result.images) == same
    assert result.info["prompt"] == "a tree<lora:pocket-lcm:0.7>"
    assert [lora["name"] for lora in api.get_loras()] == ["pocket-lcm"]


def test_img2img(api, library):
    image = picture()
    result = api.img2img([image], prompt="a hill", denoising_strength=0.7, **FEW)
    assert pixels(result.images) == expected(library, ImageToImage.of("a hill", image=image, strength=0.7, **SAME))
    assert result.info["ignored"] == [] and result.info["denoising_strength"] == 0.7
    assert result.parameters["init_images"] is None


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_img2img_of_another_shape_has_the_size_asked_for(api, mode):
    result = api.img2img([picture(200, 120)], resize_mode=mode, prompt="a hill", **{**FEW, "steps": 2})
    assert result.image.size == (128, 128)


def test_several_initial_images(api, library):
    images = [picture(), picture().rotate(90)]
    result = api.img2img(images, batch_size=2, prompt="a hill", denoising_strength=0.7, **FEW)
    assert result.info["all_seeds"] == [5, 6]
    requests = [
        ImageToImage.of("a hill", image=image, strength=0.7, **{**SAME, "seed": 5 + k})
        for k, image in enumerate(images)
    ]
    assert pixels(result.images) == [image for request in requests for image in expected(library, request)]


@pytest.mark.parametrize("only_masked", [True, False])
def test_inpaint(api, library, only_masked):
    image, mask = picture(), Image.new("L", (128, 128))
    ImageDraw.Draw(mask).ellipse((40, 40, 90, 90), 255)
    result = api.img2img(
        [image], mask_image=mask, mask_blur=3, inpainting_fill=1, inpaint_full_res=only_masked,
        inpaint_full_res_padding=16, denoising_strength=0.8, prompt="a boat", **FEW,
    )  # fmt: skip
    request = Inpaint.of(
        "a boat", image=image, mask=mask, blur=3, strength=0.8, margin=16 if only_masked else None, **SAME
    )
    assert pixels(result.images) == expected(library, request)
    assert result.image.getpixel((2, 2)) == image.getpixel((2, 2))
    inverted = api.img2img(
        [image], mask_image=mask, mask_blur=0, inpainting_mask_invert=1, inpaint_full_res=False, prompt="a", **FEW
    ).image
    assert inverted.getpixel((64, 64)) == image.getpixel((64, 64))


def test_controlnet_unit(api, library):
    hint = Image.new("RGB", (128, 128))
    ImageDraw.Draw(hint).rectangle((30, 30, 90, 90), outline="white")
    unit = webuiapi.ControlNetUnit(hint, model="edges", weight=0.8, guidance_end=0.7, control_mode=1)
    # without scripts of its own, this client would send the unit with all later calls, too
    result = api.txt2img(prompt="a house", controlnet_units=[unit], alwayson_scripts={}, **FEW)
    control = Control("edges", hint, scale=0.8, end=0.7, mode="prompt")
    assert pixels(result.images) == expected(library, TextToImage.of("a house", controls=[control], **SAME))
    assert result.info["ignored"] == []
    assert [name.split(" [")[0] for name in api.controlnet_model_list()] == ["edges"]
    assert "canny" in api.controlnet_module_list() and api.controlnet_version() == 2
    inverted = api.controlnet_detect([hint], module="invert").image
    assert inverted.getpixel((0, 0)) == (255, 255, 255)


def test_what_there_is(api):
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(api.util_get_sampler_names())
    assert {"automatic", "karras"} <= set(api.util_get_scheduler_names())
    (model,) = api.get_sd_models()
    assert model["model_name"] == "pocket" and model["title"] == api.util_get_current_model()
    assert model["title"].endswith(f"[{model['hash']}]") and model["sha256"].startswith(model["hash"])
    assert "/" not in model["filename"]
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    for empty in (api.get_sd_vae, api.get_hypernetworks, api.get_face_restorers, api.get_prompt_styles):
        assert empty() == []
    assert {"Latent"} == {mode["name"] for mode in api.get_latent_upscale_modes()}
    assert "Lanczos" in [upscaler["name"] for upscaler in api.get_upscalers()]
    assert api.get_memory()["ram"]["total"] > 0 and api.get_cmd_flags()["api"]
    assert api.get_scripts()["txt2img"] == ["controlnet"] and api.refresh_checkpoints() is None


def test_options(api, library):
    try:
        assert api.set_options({"randn_source": "NV", "outdir_samples": "/etc", "samples_format": "png"}) == {
            "ignored": ["outdir_samples"]
        }
        assert api.get_options()["randn_source"] == "NV"
        result = api.txt2img(prompt="a tree", **FEW)
        assert pixels(result.images) == expected(library, TextToImage.of("a tree", **SAME, rng="nv"))
    finally:
        assert api.set_options({"randn_source": "CPU"}) is None
    api.util_set_model("pocket")
    assert "detail" in api.set_options({"sd_model_checkpoint": "../../etc/passwd"})
    kept = api.txt2img(
        prompt="a", override_settings={"tiling": True}, override_settings_restore_afterwards=False, **FEW
    )
    assert kept and api.get_options()["tiling"]
    api.set_options({"tiling": False})


def test_progress_interrupt_and_skip(api):
    assert api.get_progress()["progress"] == 0
    api.util_wait_for_ready()
    done = []
    call = {"prompt": "a", "seed": 1, "n_iter": 2, **SIZE, "steps": 150}
    thread = threading.Thread(target=lambda: done.append(api.txt2img(**call)))
    thread.start()
    seen, until = [], time.monotonic() + 20
    other = webuiapi.WebUIApi(baseurl=api.baseurl)
    while not seen and time.monotonic() < until:
        found = other.get_progress()
        if found["current_image"] and found["state"]["sampling_step"]:
            seen.append(found)
    (found,) = seen
    assert image_in(found["current_image"]).size == (128, 128)
    assert 0 < found["progress"] < 1 and found["eta_relative"] > 0
    assert found["state"]["job_count"] == 2 and found["state"]["sampling_steps"] == 150
    assert other.skip() is None
    assert other.interrupt() == {}
    thread.join(20)
    (result,) = done
    assert result.info["interrupted"] and 1 <= len(result.images) <= 2
    assert api.get_progress()["state"]["job_count"] == 0


def test_enlarging(api):
    image = picture(40, 30)
    assert api.extra_single_image(image, upscaler_1="Lanczos", upscaling_resize=2).image.size == (80, 60)
    sized = {"resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 64, "upscaler_1": "Nearest"}
    assert api.extra_single_image(image, **sized).image.size == (64, 64)
    assert api.extra_single_image(image, **sized, upscaling_crop=False).image.size == (64, 48)
    many = api.extra_batch_images([image, image], upscaler_1="Lanczos", upscaling_resize=1.5)
    assert [image.size for image in many.images] == [(60, 45)] * 2
    for name in ("R-ESRGAN 4x+", "SwinIR 4x"):
        with pytest.raises(RuntimeError, match="not available, only None, Lanczos"):
            api.extra_single_image(image, upscaler_1=name)
    with pytest.raises(RuntimeError, match="Model not found"):
        api.interrogate(image)


def test_the_key_is_the_password():
    with running(ServerSettings(api_key="secret-key")) as (locked, _):
        for password, status in (("wrong-key", 401), ("secret-key", 200)):
            api = webuiapi.WebUIApi(baseurl=f"{locked}/sdapi/v1", username="anybody", password=password)
            answer = api.session.get(f"{locked}/sdapi/v1/samplers")
            assert answer.status_code == status
            assert status == 200 or {"error", "detail"} < set(answer.json())
