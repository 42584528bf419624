//! A palette PNG writer, just enough for maps: pictures of bytes as data URIs.

use super::base64;
use crate::results::Map;

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |c, &b| {
        (0..8).fold(c ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xEDB8_8320 } else { c >> 1 })
    })
}

fn adler(bytes: &[u8]) -> u32 {
    let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), &x| {
        let a = (a + u32::from(x)) % 65521;
        (a, (b + a) % 65521)
    });
    b << 16 | a
}

fn chunk(out: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    out.extend((data.len() as u32).to_be_bytes());
    let at = out.len();
    out.extend(kind);
    out.extend(data);
    let c = crc(&out[at..]);
    out.extend(c.to_be_bytes());
}

/// White through amber and red to near black, lightness falling all the way, so that it also
/// reads without colour.
fn palette() -> Vec<u8> {
    let stops = [
        (0, [250u8, 250, 248]),
        (40, [253, 224, 140]),
        (120, [240, 120, 50]),
        (200, [150, 25, 70]),
        (255, [25, 5, 40]),
    ];
    (0..256usize)
        .flat_map(|i| {
            let j = stops.windows(2).position(|w| i <= w[1].0).unwrap_or(stops.len() - 2);
            let ((x0, a), (x1, b)) = (stops[j], stops[j + 1]);
            let t = (i - x0) as f64 / (x1 - x0) as f64;
            (0..3).map(move |c| (f64::from(a[c]) + t * (f64::from(b[c]) - f64::from(a[c]))).round() as u8)
        })
        .collect()
}

/// The map as a PNG file.
pub fn png(m: &Map) -> Vec<u8> {
    let mut raw = Vec::with_capacity(m.rows * (m.cols + 1));
    for row in m.cells.chunks(m.cols.max(1)) {
        raw.push(0);
        raw.extend_from_slice(row);
    }
    // zlib with stored blocks: maps are small and the page needs no compressor.
    let mut z = vec![0x78, 0x01];
    let blocks = raw.chunks(65_535).count();
    for (i, b) in raw.chunks(65_535).enumerate() {
        z.push(u8::from(i + 1 == blocks));
        z.extend((b.len() as u16).to_le_bytes());
        z.extend((!(b.len() as u16)).to_le_bytes());
        z.extend_from_slice(b);
    }
    z.extend(adler(&raw).to_be_bytes());
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut head = Vec::new();
    head.extend((m.cols as u32).to_be_bytes());
    head.extend((m.rows as u32).to_be_bytes());
    head.extend([8, 3, 0, 0, 0]);
    chunk(&mut out, b"IHDR", &head);
    chunk(&mut out, b"PLTE", &palette());
    chunk(&mut out, b"IDAT", &z);
    chunk(&mut out, b"IEND", &[]);
    out
}

/// The map as a data URI.
pub fn data_uri(m: &Map) -> String {
    format!("data:image/png;base64,{}", base64::encode(&png(m)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_match_their_known_answers() {
        // The published check values of CRC-32 and Adler-32.
        assert_eq!(crc(b"123456789"), 0xCBF4_3926);
        assert_eq!(adler(b"Wikipedia"), 0x11E6_0398);
    }

    #[test]
    fn file_layout() {
        let m = Map { system: 0, caption: String::new(), rows: 2, cols: 3, cells: vec![0, 1, 2, 3, 4, 255] };
        let p = png(&m);
        assert_eq!(&p[..8], b"\x89PNG\r\n\x1a\n");
        assert_eq!(&p[16..24], [0, 0, 0, 3, 0, 0, 0, 2]);
        // IEND is the same twelve bytes in every PNG.
        assert_eq!(&p[p.len() - 12..], [0, 0, 0, 0, 0x49, 0x45, 0x4E, 0x44, 0xAE, 0x42, 0x60, 0x82]);
        let idat = p.windows(4).position(|w| w == b"IDAT").unwrap() + 4;
        // Stored block: header 78 01, last, length 8, its complement, then filter byte and rows.
        assert_eq!(&p[idat..idat + 7], [0x78, 0x01, 1, 8, 0, 0xF7, 0xFF]);
        assert_eq!(&p[idat + 7..idat + 15], [0, 0, 1, 2, 0, 3, 4, 255]);
    }
}
