"""One line for each term that the report uses."""

from __future__ import annotations

TERMS: dict[str, str] = {
    "sample": "one planned image with its mask; it ends accepted, rejected or failed, exactly one of the three.",
    "accepted": "passed every rule of the gate; the only samples that are released.",
    "rejected": "made, and turned down by the gate for the one reason given.",
    "failed": "could not be made or checked, for the reason given.",
    "gate": "the automatic check between generator and release: is there a lesion, and does the mask fit it?",
    "mask": "the lesion's area in the image; its outline is drawn on the pictures.",
    "IoU": "shared area of two masks divided by their joint area; here of a sample's and a segmenter's.",
    "Dice": "twice the shared area of two masks divided by the sum of their areas; 1 is identical.",
    "AUC": "area under the ROC curve: the chance that a malignant image is scored above a benign one; 0.5 is guessing.",
    "F1": "harmonic mean of precision and recall; 1 is perfect.",
    "lesions missed": "the false-negative rate: lesions for which the segmenter draws no area with an IoU of 0.5.",
    "precision": "of the samples that the gate accepts, the share that is truly good.",
    "recall": "of the truly good samples, the share that the gate accepts.",
    "specificity": "of the truly bad samples, the share that the gate refuses.",
    "interval": "the range that holds the true value with 95% confidence; for shares it is Wilson's score interval.",
    "skin type": "Fitzpatrick's six bands from I (very light) to VI (dark); for samples, the one that was asked for.",
    "ITA": "individual typology angle: the colour of skin around a lesion, in degrees; it is no Fitzpatrick type.",
    "copies": "images that show one photograph, whatever was re-encoded, resized, flipped or turned in between.",
    "group": "images that share a patient, a lesion or a photograph, however indirectly; it lies in one split.",
    "effective size": "Kish's: how many equally weighted images would tell as much as the weighted ones do.",
    "phantom": "a procedurally drawn lesion whose mask and attributes are known exactly.",
    "asymmetry, border, colours": "the A, B and C of the ABC rule: what captions say beside the diagnosis.",
    "real, repeated": "the control arm: real images shown as often as real and synthetic ones together.",
    "near-copy": "a sample nearer to a training image than real images of different lesions are to each other.",
    "parent": "anything the samples were made from: corpus images and weights; their licences bind the release.",
    "early rejection": "stopping a hopeless sample before its last denoiser call, which saves the remaining calls.",
    "fingerprint": "a digest of the recipe; equal fingerprints mean the same settings.",
}
