//! The contact sheet: the most suspicious images in a grid, each with its given and its suggested label below.

use std::io::Cursor;

use image::{ImageFormat, Rgb, RgbImage};

use super::text::Pen;
use crate::data::Dataset;
use crate::error::{Error, Result};

/// What the sheet shows of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Position of the image in the data set that is given with the entries.
    pub position: usize,
    /// The image's index as `audit.csv` has it.
    pub index: u32,
    /// Name of the given label.
    pub given: String,
    /// Its probability.
    pub p_given: f64,
    /// Name of the suggested label.
    pub suggested: String,
    /// Its probability.
    pub p_suggested: f64,
    /// Whether the given label is wrong, where that is known.
    pub wrong: Option<bool>,
}

/// Sides of everything on a sheet, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Images side by side.
    pub columns: u32,
    /// Rows of images.
    pub rows: u32,
    /// Screen pixels per pixel of an image, each way.
    pub scale: u32,
    /// An image on the sheet.
    pub image: [u32; 2],
    /// An image with its text, without the gap to the next one.
    pub cell: [u32; 2],
}

/// Smallest side that the longer side of an image is enlarged to, as far as whole factors go.
const IMAGE_SIDE: u32 = 112;
/// Smallest width of a cell: room for a class name of usual length.
const CELL_WIDTH: u32 = 136;
/// Around the sheet, and between cells.
const MARGIN: u32 = 20;
const GAP: u32 = 14;
/// Above the grid.
const HEAD: u32 = 58;
/// Frame around an image, and its distance from the cell's top.
const FRAME: u32 = 3;
/// Below an image: given, suggested, numbers.
const TEXT: u32 = 52;

const PAPER: Rgb<u8> = Rgb([255, 255, 255]);
const INK: Rgb<u8> = Rgb([28, 28, 30]);
const FAINT: Rgb<u8> = Rgb([120, 120, 126]);
/// A given label under suspicion.
const GIVEN: Rgb<u8> = Rgb([178, 34, 34]);
/// A suggested label.
const SUGGESTED: Rgb<u8> = Rgb([0, 95, 115]);
/// Frames: nothing known, the suspicion is right, the suspicion is wrong.
const UNKNOWN: Rgb<u8> = Rgb([214, 214, 218]);
const CONFIRMED: Rgb<u8> = Rgb([0, 135, 108]);
const FALSE_ALARM: Rgb<u8> = Rgb([240, 150, 0]);

impl Layout {
    /// The grid for `count` images of `width`×`height` pixels: about three columns to two rows.
    pub fn new(count: usize, width: usize, height: usize) -> Self {
        let (count, width, height) = (count as u32, width as u32, height as u32);
        let scale = (IMAGE_SIDE.div_ceil(width.max(height).max(1))).max(1);
        let image = [width * scale, height * scale];
        let cell = [CELL_WIDTH.max(image[0] + 2 * FRAME), image[1] + 2 * FRAME + TEXT];
        let ideal = (f64::from(count) * 1.5 * f64::from(cell[1]) / f64::from(cell[0])).sqrt().round() as u32;
        let near = [ideal, ideal.saturating_sub(1), ideal + 1].map(|columns| columns.clamp(1, count.max(1)));
        // The fewest empty places in the last row; the first of equals.
        let columns = near.into_iter().min_by_key(|c| count.div_ceil(*c) * c - count).unwrap_or(1);
        Layout { columns, rows: count.div_ceil(columns), scale, image, cell }
    }

    /// Width and height of the sheet.
    pub fn size(&self) -> [u32; 2] {
        let along = |n: u32, cell: u32| n * cell + n.saturating_sub(1) * GAP;
        let width = 2 * MARGIN + along(self.columns, self.cell[0]);
        [width.max(MIN_WIDTH), HEAD + 2 * MARGIN + along(self.rows, self.cell[1])]
    }

    /// Left and top of the cell of entry `i`, row by row.
    fn cell_at(&self, i: usize) -> [u32; 2] {
        let (column, row) = (i as u32 % self.columns, i as u32 / self.columns);
        [MARGIN + column * (self.cell[0] + GAP), HEAD + MARGIN + row * (self.cell[1] + GAP)]
    }

    /// Left and top of the image of entry `i`.
    pub fn image_at(&self, i: usize) -> [u32; 2] {
        let [x, y] = self.cell_at(i);
        [x + (self.cell[0] - self.image[0]) / 2, y + FRAME]
    }
}

/// Room for the heading of a sheet with few images.
const MIN_WIDTH: u32 = 840;

/// The sheet as a PNG file: `entries` from left to right and top to bottom, below `title` and a line that explains the
/// colours. Images `[C, H, W]` of three channels are taken as red, green and blue, others as grey by their first
/// channel; they are enlarged by a whole factor without smoothing.
///
/// # Errors
/// [`Error::Usage`] for a sheet too large to be an image.
pub fn draw(images: &Dataset, entries: &[Entry], title: &str) -> Result<Vec<u8>> {
    let pen = Pen::new()?;
    let layout = Layout::new(entries.len(), images.width, images.height);
    let [width, height] = layout.size();
    if u64::from(width) * u64::from(height) > 1 << 28 {
        return Err(Error::usage(format_args!("{} images make a sheet of {width}×{height} pixels", entries.len())));
    }
    let mut sheet = RgbImage::from_pixel(width, height, PAPER);
    heading(&mut sheet, &pen, title, entries.iter().any(|e| e.wrong.is_some()));
    for (i, entry) in entries.iter().enumerate() {
        let [x, y] = layout.image_at(i);
        let frame = match entry.wrong {
            None => UNKNOWN,
            Some(true) => CONFIRMED,
            Some(false) => FALSE_ALARM,
        };
        let [w, h] = layout.image;
        fill(&mut sheet, [x - FRAME, y - FRAME], [w + 2 * FRAME, h + 2 * FRAME], frame);
        enlarge(&mut sheet, images, entry.position, layout.scale, [x, y]);
        caption(&mut sheet, &pen, &layout, i, entry);
    }
    let mut bytes = Cursor::new(Vec::new());
    sheet.write_to(&mut bytes, ImageFormat::Png).map_err(|e| Error::usage(format_args!("the contact sheet: {e}")))?;
    Ok(bytes.into_inner())
}

/// Title and legend.
fn heading(sheet: &mut RgbImage, pen: &Pen, title: &str, known: bool) {
    let room = (sheet.width() - 2 * MARGIN) as f32;
    let mut x = MARGIN as f32;
    pen.draw(sheet, (x, MARGIN as f32 + 18.0), 21.0, INK, &pen.fit(title, 21.0, room));
    let mut word = |sheet: &mut RgbImage, colour, text: &str| {
        pen.draw(sheet, (x, MARGIN as f32 + 42.0), 14.0, colour, text);
        x += pen.width(text, 14.0);
    };
    word(sheet, GIVEN, "given label");
    word(sheet, INK, " → ");
    word(sheet, SUGGESTED, "suggested label");
    word(sheet, FAINT, ", their probabilities, and the image's index");
    if known {
        word(sheet, FAINT, ".  Frame: ");
        word(sheet, CONFIRMED, "given label is wrong");
        word(sheet, FAINT, ", ");
        word(sheet, FALSE_ALARM, "given label is right");
    }
}

/// The three lines below an image.
fn caption(sheet: &mut RgbImage, pen: &Pen, layout: &Layout, i: usize, entry: &Entry) {
    let [left, top] = layout.cell_at(i);
    let room = layout.cell[0] as f32;
    let below = (top + layout.image[1] + 2 * FRAME) as f32;
    let mut line = |baseline: f32, size: f32, parts: &[(Rgb<u8>, &str)]| {
        let width: f32 = parts.iter().map(|(_, text)| pen.width(text, size)).sum();
        let mut x = left as f32 + (room - width).max(0.0) / 2.0;
        for (colour, text) in parts {
            pen.draw(sheet, (x, below + baseline), size, *colour, text);
            x += pen.width(text, size);
        }
    };
    let arrow = "→ ";
    // A long name is written smaller before it is cut.
    let size = |text: &str| [14.0, 12.0].into_iter().find(|size| pen.width(text, *size) <= room).unwrap_or(11.0);
    let given = size(&entry.given);
    line(14.0, given, &[(GIVEN, &pen.fit(&entry.given, given, room))]);
    let suggested = size(&format!("{arrow}{}", entry.suggested));
    let name = pen.fit(&entry.suggested, suggested, room - pen.width(arrow, suggested));
    line(30.0, suggested, &[(INK, arrow), (SUGGESTED, &name)]);
    let numbers = format!("{:.3} → {:.3}   #{}", entry.p_given, entry.p_suggested, entry.index);
    line(45.0, 11.5, &[(FAINT, &pen.fit(&numbers, 11.5, room))]);
}

/// A rectangle of one colour.
fn fill(sheet: &mut RgbImage, at: [u32; 2], size: [u32; 2], colour: Rgb<u8>) {
    for y in at[1]..at[1] + size[1] {
        for x in at[0]..at[0] + size[0] {
            sheet.put_pixel(x, y, colour);
        }
    }
}

/// Image `i` of `images`, each of its pixels a square of `scale`×`scale`.
fn enlarge(sheet: &mut RgbImage, images: &Dataset, i: usize, scale: u32, at: [u32; 2]) {
    let (pixels, (width, height)) = (images.image(i), (images.width, images.height));
    let channel = |c: usize, at: usize| pixels[c * width * height + at];
    for p in 0..width * height {
        let colour = match images.channels {
            3 => Rgb([0, 1, 2].map(|c| channel(c, p))),
            _ => Rgb([channel(0, p); 3]),
        };
        let corner = [at[0] + (p % width) as u32 * scale, at[1] + (p / width) as u32 * scale];
        fill(sheet, corner, [scale; 2], colour);
    }
}
