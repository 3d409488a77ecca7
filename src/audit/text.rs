//! Text on an image, in a font that the program brings along (`assets/font/`).

use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};
use image::{Rgb, RgbImage};

use crate::error::{Error, Result};

/// DejaVu Sans Condensed: Latin, Greek, Cyrillic, arrows.
const FONT: &[u8] = include_bytes!("../../assets/font/DejaVuSansCondensed-subset.ttf");

/// A font that draws on images.
pub struct Pen {
    font: FontRef<'static>,
}

impl Pen {
    /// The embedded font.
    ///
    /// # Errors
    /// [`Error::Usage`] if the embedded file is none, which a test rules out.
    pub fn new() -> Result<Self> {
        let font = FontRef::try_from_slice(FONT).map_err(|e| Error::usage(format_args!("the embedded font: {e}")))?;
        Ok(Pen { font })
    }

    /// Width of `text` in pixels when its em is `size` pixels high.
    pub fn width(&self, text: &str, size: f32) -> f32 {
        self.glyphs(text, size).last().map_or(0.0, |(_, _, end)| end)
    }

    /// Each character with its left edge and the end of its advance, in pixels.
    fn glyphs(&self, text: &str, size: f32) -> impl Iterator<Item = (ab_glyph::GlyphId, f32, f32)> {
        let font = self.font.as_scaled(self.scale(size));
        let (mut x, mut before) = (0.0, None);
        text.chars().map(move |c| {
            let id = font.glyph_id(c);
            let from = x + before.map_or(0.0, |b| font.kern(b, id));
            x = from + font.h_advance(id);
            before = Some(id);
            (id, from, x)
        })
    }

    /// The scale at which an em is `size` pixels high: the library counts from the lowest descender to the highest
    /// ascender.
    fn scale(&self, size: f32) -> PxScale {
        self.font.pt_to_px_scale(size * 0.75).unwrap_or(PxScale::from(size))
    }

    /// `text`, or as much of it as fits `width` pixels with an ellipsis behind.
    pub fn fit(&self, text: &str, size: f32, width: f32) -> String {
        if self.width(text, size) <= width {
            return text.to_string();
        }
        let mut kept: Vec<char> = text.chars().collect();
        loop {
            kept.pop();
            let shorter = format!("{}…", kept.iter().collect::<String>().trim_end());
            if kept.is_empty() || self.width(&shorter, size) <= width {
                return shorter;
            }
        }
    }

    /// Draws one line with its left end and baseline at `at`; what lies outside the image is left out.
    pub fn draw(&self, image: &mut RgbImage, at: (f32, f32), size: f32, colour: Rgb<u8>, text: &str) {
        for (id, x, _) in self.glyphs(text, size) {
            let glyph = id.with_scale_and_position(self.scale(size), point(at.0 + x, at.1));
            let Some(outline) = self.font.outline_glyph(glyph) else { continue };
            let corner = outline.px_bounds().min;
            outline.draw(|dx, dy, cover| {
                let (x, y) = (corner.x as i64 + i64::from(dx), corner.y as i64 + i64::from(dy));
                let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { return };
                let Some(pixel) = image.get_pixel_mut_checked(x, y) else { return };
                let cover = cover.clamp(0.0, 1.0);
                for (p, c) in pixel.0.iter_mut().zip(colour.0) {
                    *p = (f32::from(*p) * (1.0 - cover) + f32::from(c) * cover).round() as u8;
                }
            });
        }
    }
}
