#!/bin/sh
# From a folder of images to an encoder, and from a few labels to a classifier: ten commands.
#
#   sh examples/day.sh ~/photos labels.csv work        # or: EPOCHS=200 sh examples/day.sh ...
#
# labels.csv has lines of `name,class` for some of the images (a few hundred are enough). The settings are small enough
# for a laptop without a GPU; for a real run take a larger backbone, larger images and more epochs. Every command goes
# on where it was stopped, or finds its work done, so the script may be started again.
set -eu
images=$1
labels=$2
out=$3
epochs=${EPOCHS:-20}
batch=${BATCH:-128}
tune_epochs=${TUNE_EPOCHS:-60}

# 1. Check the images and write them as shards; what is no image is listed in rejected.jsonl
siamstream shard "$images" "$out/data" --labels none --sixteen-bit min-max
# 2. Look at what training will see
siamstream preview "$out/data" "$out/preview.png" --recipe demo
# 3. Train without labels
siamstream pretrain --recipe demo --data "$out/data" --run-dir "$out/run" --epochs "$epochs" --global-batch "$batch" --resume
# 4. Features of every image
siamstream embed "$out/run" "$out/data" "$out/embeddings"
# 5. What does the encoder find alike?
siamstream neighbours "$out/embeddings" "$out/data" "$out/neighbours.png"
# 6. Which images are there twice?
siamstream neighbours "$out/embeddings" "$out/data" "$out/twins.png" --duplicates 0.999
# 7. The same images with the labels there are, a quarter of them held out for validation
siamstream shard "$images" "$out/labelled" --labels "$labels" --sixteen-bit min-max --hold-out 0.25
# 8. A classifier from few labels; large rates, as the encoder has been trained for minutes only (the default is for more)
siamstream finetune --checkpoint "$out/run" --data "$out/labelled" --val-data "$out/labelled-val" --run-dir "$out/tuned" --epochs "$tune_epochs" --global-batch 32 --lr 0.8 --head-lr 0.8 --checkpoint-every 500steps --resume
# 9. Classes of all images; exit code 1 only says that some files could not be read
siamstream predict "$out/tuned" "$images" > "$out/predictions.csv" || [ $? = 1 ]
# 10. One page about the run
siamstream report "$out/run" --out "$out/report.html"
