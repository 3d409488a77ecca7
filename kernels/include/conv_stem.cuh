// The image of few channels, as the kernels of `conv_stem.cu` hold a patch's halo of it: pixels of four channels of 16 bits, those that the
// image does not have zero, 8 bytes each.
//
// A thread of a product takes all channels of a pixel in one load: of a matrix's four, or eight, taps each has one. Lines of the halo lie
// so far apart that half a warp's loads meet no bank twice, of neighbouring pixels and taps that are neighbours or go over to the next
// line. The 16 places for a pixel in the banks are then used once each, since the distance is that of the pixels and taps of a line.
#pragma once

#include "conv_patch.cuh"

constexpr int STEM_CHANNELS = 4;
constexpr uint32_t STEM_PIXEL = 2 * STEM_CHANNELS;  // bytes
constexpr uint32_t STEM_BANKS = 16;                 // pixels side by side in the banks of shared memory

// Pixels from a line of the halo to the next. Half a warp loads four taps of four pixels: neighbours, or every second in wgrad.
template <Form FORM>
DEVICE uint32_t stem_pitch(const ConvProduct& p, int32_t pixel_step) {
    const uint32_t wanted = uint32_t(p.kernel_width + (FORM == Form::WGRAD ? 6 : 3) * pixel_step);
    return uint32_t(p.halo_width) + ((wanted - uint32_t(p.halo_width)) & (STEM_BANKS - 1));
}

// Pixels of the halo.
DEVICE uint32_t stem_pixels(const ConvProduct& p) {
    return uint32_t(p.patch_images) * uint32_t(p.halo_height) * uint32_t(p.halo_width);
}

// The quotient of `a`, below 2^20, and a number whose inverse is given. A half keeps it further from an integer than rounding reaches.
DEVICE uint32_t stem_quotient(uint32_t a, float inverse) { return uint32_t((float(a) + 0.5f) * inverse); }

// Pixel `at` of every halo: its image, its line and its place in that, in 8, 12 and 12 bits.
DEVICE uint32_t stem_pixel(const ConvProduct& p, uint32_t at) {
    const uint32_t line = stem_quotient(at, 1.0f / float(p.halo_width));
    const uint32_t image = stem_quotient(line, 1.0f / float(p.halo_height));
    return image << 24 | (line - image * uint32_t(p.halo_height)) << 12 | (at - line * uint32_t(p.halo_width));
}

// Where it lies, in bytes from the halo's first.
DEVICE uint32_t stem_place(const ConvProduct& p, uint32_t pixel, uint32_t pitch) {
    const uint32_t line = (pixel >> 24) * uint32_t(p.halo_height) + (pixel >> 12 & 0xfff);
    return (line * pitch + (pixel & 0xfff)) * STEM_PIXEL;
}

// Where the halo holds a patch's pixel with tap (0, 0); anywhere in it what no patch has.
DEVICE uint32_t stem_place_of(const ConvProduct& p, const Pixel& pixel, int32_t pixel_step, uint32_t pitch) {
    if (pixel.image < 0) return 0;
    const uint32_t line = uint32_t(pixel.image * p.halo_height + pixel.down * pixel_step);
    return (line * pitch + uint32_t(pixel.across * pixel_step)) * STEM_PIXEL;
}

// Bytes of the halo from tap (0, 0) of a pixel to another; taps beyond the last are that tap again, so that nothing else is read.
DEVICE uint32_t stem_tap(const ConvProduct& p, int32_t tap, uint32_t pitch) {
    const int32_t taps = p.kernel_height * p.kernel_width;
    if (tap >= taps) tap = taps - 1;
    const int32_t r = tap / p.kernel_width;
    return (uint32_t(r) * pitch + uint32_t(tap - r * p.kernel_width)) * STEM_PIXEL;
}

// So many neighbouring channels of a tensor, from element `at` on, and zeros for the others, and where it is not `inside`.
template <class Operand>
DEVICE float4 stem_channels(int32_t channels, const Source& from, uint32_t at, bool inside) {
    const auto channel = [&](int32_t c) {
        return inside && c < channels ? conv_load<Operand>(from.at, int64_t(at) + c, from.half) : 0.0f;
    };
    return {channel(0), channel(1), channel(2), channel(3)};
}

// Pixel `pixel` of a patch's halo: zeros outside the image.
template <class Operand>
DEVICE float4 stem_load(const ConvProduct& p, const Patch& patch, const Source& x, uint32_t pixel) {
    const int32_t n = patch.image + int32_t(pixel >> 24);
    const int32_t h = patch.halo_down + int32_t(pixel >> 12 & 0xfff) * patch.halo_step;
    const int32_t w = patch.halo_across + int32_t(pixel & 0xfff) * patch.halo_step;
    const bool inside =
        n < p.images && uint32_t(h) < uint32_t(p.image_height) && uint32_t(w) < uint32_t(p.image_width);
    const uint32_t at = (uint32_t(n) * uint32_t(p.image_height) + uint32_t(h)) * uint32_t(p.image_width) + uint32_t(w);
    return stem_channels<Operand>(p.image_channels, x, at * uint32_t(p.image_channels), inside);
}

// Four channels at byte `to` of the block's shared memory, rounded; and as they are read again.
template <class Operand>
DEVICE void stem_store(uint32_t to, const float4& v) {
    *reinterpret_cast<uint2*>(shared_memory<unsigned char>() + to) = {Operand::encode(v.x, v.y), Operand::encode(v.z, v.w)};
}
DEVICE uint2 stem_read(uint32_t from) { return *reinterpret_cast<const uint2*>(shared_memory<unsigned char>() + from); }

// Block number `i` of a product. Those of all branches, which read the same part of a shared image, run at about the same time.
DEVICE ConvPlace stem_block(const ConvProduct& p, uint32_t i) {
    ConvPlace place;
    place.column_tile = i % p.column_tiles;
    i /= p.column_tiles;
    place.branch = i % p.branches;
    i /= p.branches;
    place.row_tile = i % p.row_tiles;
    place.split = i / p.row_tiles;
    return place;
}
