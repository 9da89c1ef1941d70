"""The fourteen operations of strong augmentation by PIL, image by image: the tests' oracle, the benchmark's rival."""

from PIL import Image, ImageEnhance, ImageOps


def affine(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


PIL_OPERATIONS = {
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "Color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "Contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "Equalize": lambda image, v: ImageOps.equalize(image), "Identity": lambda image, v: image,
    "Posterize": lambda image, v: ImageOps.posterize(image, int(v)), "Rotate": lambda image, v: image.rotate(v),
    "Sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "ShearX": lambda image, v: affine(image, 1, v, 0, 0, 1, 0),
    "ShearY": lambda image, v: affine(image, 1, 0, 0, v, 1, 0),
    "Solarize": lambda image, v: ImageOps.solarize(image, v),
    "TranslateX": lambda image, v: affine(image, 1, 0, v * image.size[0], 0, 1, 0),
    "TranslateY": lambda image, v: affine(image, 1, 0, 0, 0, 1, v * image.size[1])}
